"""`--dry-run`: what a run on any number of processes will need, without the devices.

Counted from the configuration: batch, steps, arithmetic, bytes in memory and over the network. Measured here,
on the CPU: the bytes that two images and their texts leave for the backward pass. Taken from a measurement
that the user names: pairs a second of one device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from groupvit_fast.console import UserError
from groupvit_fast.model.groupvit import GroupViT, create_model
from groupvit_fast.model.packing import pack_texts
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.training import parallel, sharding
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.flops import training_flops
from groupvit_fast.training.losses import SIMILARITIES_AT_ONCE
from groupvit_fast.training.optim import freeze
from groupvit_fast.training.recipes import model_config

CAPTION_TOKENS, PROMPT_TOKENS = 12, 8
"""Typical lengths, which the plan assumes."""
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes and rates are of one process unless the name says otherwise."""

    world_size: int
    global_batch: int
    steps: int | None
    parameters: int
    flops_a_step: float
    state_bytes: int
    gathered_bytes: int
    activation_bytes: int
    loss_bytes: int
    weight_traffic: int
    gradient_traffic: int
    embedding_traffic: int
    measured_pairs_per_s: float | None
    measured_source: str | None

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.gathered_bytes + self.activation_bytes + self.loss_bytes

    @property
    def pairs_per_s(self) -> float | None:
        """Of all processes, if nothing is lost to the network or the data."""
        return self.measured_pairs_per_s and self.measured_pairs_per_s * self.world_size

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"memory_bytes": self.memory_bytes, "pairs_per_s": self.pairs_per_s}


def make_plan(config: TrainConfig) -> Plan:
    """The plan of `config` on `config.world_size` processes."""
    settings, world = model_config(config), config.world_size or 1
    model = create_model(settings, seed=0)
    freeze(model, config.freeze)
    parallel.checkpoint_stages(model, config.grad_checkpointing)
    sharding.refuse(config)
    if config.fsdp and world > 1:
        needs = needs_of_shares(model, world, config.accum_freq)
    else:
        needs = needs_of_copies(model, world)
    texts = 1 + config.multi_label
    share = config.batch_size * config.accum_freq
    lengths = [CAPTION_TOKENS] + [PROMPT_TOKENS] * config.multi_label
    embeddings = share * (1 + texts) * settings.embed_dim * 4
    rate, source = _measured(config)
    return Plan(
        world_size=world,
        global_batch=share * world,
        steps=_steps(config, share * world),
        parameters=_numbers(model.parameters()),
        flops_a_step=share * training_flops(settings, lengths, texts),
        state_bytes=needs.state_bytes,
        gathered_bytes=needs.gathered_bytes,
        activation_bytes=int(config.batch_size * kept_bytes_per_image(model, settings, config.multi_label)),
        loss_bytes=2 * embeddings * world + 4 * _similarities(share, world, texts),
        weight_traffic=needs.weight_traffic,
        gradient_traffic=needs.gradient_traffic,
        # features come from everybody, and their gradients go back
        embedding_traffic=2 * embeddings * (world - 1),
        measured_pairs_per_s=rate,
        measured_source=source,
    )


@dataclass(frozen=True)
class Needs:
    """Bytes that parameters, gradients and moments take on a process and make it send in a step."""

    state_bytes: int
    gathered_bytes: int
    weight_traffic: int
    gradient_traffic: int


def needs_of_copies(model: GroupViT, world: int) -> Needs:
    """Everything on every process, float32. A ring sends each gradient twice, but for one's own part."""
    state = 4 * sum(p.numel() * _copies(p) for p in model.parameters())
    traffic = 2 * 4 * _numbers(model.parameters(), trained=True) * (world - 1) // world
    return Needs(state_bytes=state, gathered_bytes=0, weight_traffic=0, gradient_traffic=traffic)


def needs_of_shares(model: GroupViT, world: int, pieces: int = 1) -> Needs:
    """With `--fsdp`, float32, for `pieces` of accumulation, on the process with the largest shares.

    Gathered at a time: what belongs to no unit, with its gradients; and of the largest unit the weights, the
    gradients and the message that these leave in, besides the unit that is fetched meanwhile.
    """
    parts = sharding.units(model)
    inside = {parameter for part in parts for parameter in part.parameters()}
    rest = [p for p in model.parameters() if p.dim() > 0 and p not in inside]
    largest = max(_numbers(part.parameters()) for part in parts)
    # a unit is gathered for each forward and backward pass, the rest once for both; accumulation runs
    # forward, forward again and backward for each piece, but the projectors once
    gathers = 2 * _numbers(inside) + _numbers(rest)
    reductions = _numbers([*inside, *rest], trained=True)
    if pieces > 1:
        gathers = 3 * pieces * _numbers(inside) + (1 + pieces) * _numbers(rest)
        projectors = [*model.image_projector.parameters(), *model.text_projector.parameters()]
        reductions = pieces * reductions - (pieces - 1) * _numbers(projectors, trained=True)
    return Needs(
        state_bytes=4 * sum(sharding.largest_share(p, world) * _copies(p) for p in model.parameters()),
        gathered_bytes=4 * (_numbers(rest) + _numbers(rest, trained=True) + 4 * largest),
        weight_traffic=4 * gathers * (world - 1) // world,
        gradient_traffic=4 * reductions * (world - 1) // world,
    )


def _copies(parameter: torch.Tensor) -> int:
    """Weight, gradient and two moments; of a frozen parameter the weight."""
    return 4 if parameter.requires_grad else 1


def _numbers(parameters: Iterable[torch.Tensor], *, trained: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def kept_bytes_per_image(model: GroupViT, settings: ModelConfig, prompts: int) -> float:
    """Bytes that one image and its texts leave for the backward pass, float32, measured with two images."""
    side, weights = settings.image.image_size, {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = min(CAPTION_TOKENS, settings.text.context_length)
    tokens = torch.ones(2 * (1 + prompts), length, dtype=torch.int64)
    tokens[:, -1] = settings.text.vocab_size - 1
    index = torch.arange(len(tokens)).view(2, -1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(torch.zeros(2, 3, side, side), pack_texts(tokens), index)
    del output
    return sum(kept.values()) / 2


def text(plan: Plan, config: TrainConfig) -> str:
    """The plan for people."""
    share = config.batch_size * config.accum_freq
    sharded = plan.gathered_bytes > 0
    gathered = f"{plan.gathered_bytes / GIB:.2f} of them gathered at a time; " if sharded else ""
    weights = f"{plan.weight_traffic / 1e6:.0f} MB of weights, " if sharded else ""
    lines = [
        f"preset {config.preset} on {plan.world_size} processes; nothing was started",
        f"global batch   {plan.global_batch} pairs: {config.batch_size} x {config.accum_freq} batches a step "
        f"x {plan.world_size}",
        f"steps          {plan.steps if plan.steps else 'unknown: give --steps or --train-samples'}",
        f"parameters     {plan.parameters / 1e6:.1f} M",
        f"arithmetic     {plan.flops_a_step / 1e12:.2f} TFLOP a step and process (captions of "
        f"{CAPTION_TOKENS} tokens, prompts of {PROMPT_TOKENS})",
        f"memory         {plan.memory_bytes / GIB:.1f} GiB a process: {plan.state_bytes / GIB:.2f} weights, "
        f"gradients, moments; {gathered}{plan.activation_bytes / GIB:.2f} activations of a batch in float32 "
        f"(about half with --amp); {plan.loss_bytes / GIB:.2f} losses",
        f"network        {weights}{plan.gradient_traffic / 1e6:.0f} MB of gradients and "
        f"{plan.embedding_traffic / 1e6:.0f} MB of embeddings a step and process",
    ]
    if plan.pairs_per_s is None:
        lines.append("speed          unknown: give --measured, a result of benchmarks/train_bench.py")
        return "\n".join(lines)
    seconds = share / plan.measured_pairs_per_s
    traffic = plan.weight_traffic + plan.gradient_traffic + plan.embedding_traffic
    lines += [
        f"speed          at most {plan.pairs_per_s:.0f} pairs/s: {plan.measured_pairs_per_s:.1f} of one "
        f"device ({plan.measured_source}) x {plan.world_size}; a step then takes {seconds:.3f} s",
        f"               that needs more than {traffic / seconds / 1e9:.2f} GB/s a process from the network, "
        f"and {share / seconds:.0f} decoded images/s a process from the loader",
    ]
    if plan.steps:
        lines.append(f"time           {plan.steps * seconds / 3600:.1f} hours at least")
    return "\n".join(lines)


def _steps(config: TrainConfig, global_batch: int) -> int | None:
    if config.train_samples:
        return -(-config.train_samples // global_batch)
    return config.steps


def _similarities(share: int, world: int, texts: int) -> int:
    """Similarities in memory at a time, with what their softmax keeps."""
    return 3 * min(SIMILARITIES_AT_ONCE, share * share * world * texts)


def _measured(config: TrainConfig) -> tuple[float | None, str | None]:
    """Pairs a second of our step in the result file that `--measured` names, and what it was measured on."""
    if config.measured is None:
        return None, None
    path = Path(config.measured)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in result["rows"] if row["name"] == "training step"]
        row = min(
            (row for row in rows if row["contender"].startswith("ours")), key=lambda row: row["median_s"]
        )
        rate = row["items"] / row["median_s"]
        return rate, f"{row['case']}, {row['contender']}, {result['machine']['slug']}"
    except FileNotFoundError:
        raise UserError(f"--measured {path}: no such file") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--measured {path} is not a result of benchmarks/train_bench.py") from None
