"""Exported graphs give what the model gives, at sizes they were not traced with."""

import pytest
import torch
from torch.testing import assert_close

from groupvit_fast.model.export import ImageGraph, LabelGraph, export_image_encoder, export_onnx
from groupvit_fast.model.groupvit import create_model

SIZES = [(1, 3, 48, 48), (3, 3, 96, 40), (2, 3, 61, 50), (1, 3, 16, 16)]


@pytest.fixture
def model(small_config):
    """Parameters large enough that groups differ and labels vary over the image."""
    model = create_model(small_config, seed=0).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_torch_export_takes_any_batch_and_size(model, tmp_path):
    torch.export.save(export_image_encoder(model), tmp_path / "image.pt2")
    graph = torch.export.load(tmp_path / "image.pt2").module()
    for size in SIZES:
        pixels = torch.randn(size)
        wanted = ImageGraph(model)(pixels)
        assert wanted[2].shape[2:] == (size[2] // 8, size[3] // 8)
        for found, value in zip(graph(pixels), wanted, strict=True):
            assert_close(found, value, rtol=1e-5, atol=1e-5 * max(1.0, value.abs().max().item()))


@torch.no_grad()
def test_onnx_gives_the_same_label_map(model, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript to write the file")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run it")
    bank = torch.randn(7, model.config.embed_dim)
    export_onnx(model, bank, tmp_path / "labels.onnx")
    session = runtime.InferenceSession(tmp_path / "labels.onnx", providers=["CPUExecutionProvider"])
    seen = set()
    for size in SIZES:
        pixels = torch.randn(size)
        wanted = LabelGraph(model, bank)(pixels)
        found = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        assert found.shape == (size[0], *size[2:])
        assert torch.equal(found, wanted)
        seen |= set(wanted.unique().tolist())
    assert len(seen) > 2
