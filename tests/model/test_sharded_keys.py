"""Wrapping a model for several processes does not change what a checkpoint holds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from groupvit_fast.model import create_model, load_model


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_sharded_parameters_keep_their_names_and_values(one_process, tmp_path):
    plain, sharded = create_model("tiny", seed=0), create_model("tiny", seed=0)
    # FSDP shards no 0-dim parameter; the temperatures stay whole on every process
    scalars = {parameter for parameter in sharded.parameters() if parameter.dim() == 0}
    fully_shard(sharded, mesh=one_process, ignored_params=scalars)
    assert any(hasattr(value, "full_tensor") for value in sharded.state_dict().values())
    state = {key: value.full_tensor() if hasattr(value, "full_tensor") else value
             for key, value in sharded.state_dict().items()}  # fmt: skip
    assert list(state) == list(plain.state_dict())
    fresh = create_model("tiny", seed=1)
    fresh.load_state_dict(state)
    fresh.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in plain.state_dict().items())
