"""Many processes, or many pieces, must train as one process with the whole batch does.

The model has everything that could tell samples of one process from those of others: batch norm in the
projectors, texts that repeat, prompts, two grouping stages.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from groupvit_fast.console import UserError
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig
from groupvit_fast.training import accumulation, distributed, parallel, sharding
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.trainer import Trainer

IMAGES, STEPS = 32, 20
MODEL = ModelConfig(
    image=ImageConfig(
        image_size=16, patch_size=4, width=16, heads=2, depths=(1, 1, 1), group_tokens=(6, 3),
        output_groups=(6, 3), drop_path=0.0,
    ),
    text=TextConfig(context_length=12, vocab_size=64, width=16, layers=2, heads=2),
    embed_dim=8,
    projector_hidden=24,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=STEPS, batch_size=IMAGES, lr=1e-3, warmup_steps=0, multi_label=2, gumbel=False, clip_grad=1.0,
    eps=1e-3, quiet=True,
)  # fmt: skip
"""A large epsilon: where a gradient is nearly zero, AdamW would turn its rounding error into a whole step."""


class Batch:
    def __init__(self, step: int, rows: slice, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(step)
        self.images = torch.randn(IMAGES, 3, 16, 16, generator=generator).to(dtype)[rows]
        texts = torch.randint(1, 62, (20, 12), generator=generator)
        for row in texts:
            row[int(torch.randint(2, 12, (), generator=generator)) :] = 0
            row[int((row > 0).sum()) - 1] = 63
        texts = texts.unique(dim=0)  # a loader's rows are distinct
        words = torch.randint(len(texts), (IMAGES, 3), generator=generator)[rows]
        used, index = words.unique(return_inverse=True)
        self.texts, self.text_index = texts[used], index


class Loader:
    """The part of every global batch that process `rank` of `size` gets, in `parts` batches."""

    steps_per_epoch = 100
    bad_samples = 0

    def __init__(
        self, rank: int = 0, size: int = 1, parts: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        self.rank, self.size, self.parts, self.dtype = rank, size, parts, dtype

    def __iter__(self):
        share = IMAGES // self.size // self.parts
        for step in range(10**6):
            for part in range(self.parts):
                start = (self.rank * self.parts + part) * share
                yield Batch(step, slice(start, start + share), self.dtype)

    def state_dict(self):
        return {}

    def sample_names(self):
        return []


def run(folder, config=CONFIG, *, world=None, parts=1, dtype=torch.float32, steps=STEPS, settings=MODEL):
    """Losses, first gradient and last weights of a run of `steps` steps."""
    world = world or distributed.World()
    config = replace(config, batch_size=IMAGES // world.size // parts, accum_freq=parts)
    model = settled(create_model(settings, seed=0), seed=world.rank).to(
        dtype
    )  # all must start as the main process
    loader = Loader(world.rank, world.size, parts, dtype)
    trainer = Trainer(model, loader, config, output=Path(folder), world=world)
    batches = accumulation.joined(iter(loader), parts)
    losses, gradient = [], {}
    for step in range(steps):
        trainer.means.sums[0] = 0.0  # a sum over steps would round away what is compared
        trainer.train_step(next(batches))
        losses.append(distributed.sum_over_processes(trainer.means.sums[0].clone()) / world.size)
        if step == 0:
            gradient = {
                name: sharding.whole(sharding.own(p.grad), p).clone()
                for name, p in trainer.model.named_parameters()
                if p.grad is not None
            }
    return torch.stack(losses), gradient, dict(sharding.whole_state(trainer.model))


def settled(model, seed):
    """Weights of the size that training gives them: a fresh model's vectors are so short that norms amplify
    rounding errors by thousands."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def work(folder: str) -> None:
    """What one of the processes does: this file, run as a program."""
    torch.set_num_threads(1)
    results = {}
    with distributed.session("cpu") as world:
        for name, config, dtype, parts in cases():
            settings = settings_of(config, dtype)
            with smooth(dtype):
                results[name] = run(folder, config, world=world, parts=parts, dtype=dtype, settings=settings)
        if world.is_main:
            torch.save(results, Path(folder) / "result.pt")


def cases():
    """Name, options, number type, and how many batches a step each process takes.

    In float32 another order of adding now and then turns a hard assignment over, or the sign before a ReLU,
    which no tolerance covers; so there both are smooth (`settings_of`, `smooth`), and the hard ones are
    compared in float64. A float32 gradient of this model is 4e-6 away from the float64 one; that rounding is
    the same for all numbers of processes.
    """
    double = torch.float64
    plain = replace(CONFIG, clip_grad=0.0)  # the optimiser's divisor is float32
    yield "float32", CONFIG, torch.float32, 1
    yield "float64", plain, double, 1
    yield "accumulated", plain, double, 2
    yield "everybody's loss", replace(plain, local_loss=False), double, 1
    yield "siglip", replace(plain, siglip=True, merge_captions=True), double, 1
    yield "sharded float32", replace(CONFIG, fsdp=True), torch.float32, 1
    yield "sharded float64", replace(plain, fsdp=True), double, 1
    yield "sharded accumulated", replace(plain, fsdp=True), double, 2
    yield "sharded frozen text", replace(plain, fsdp=True, freeze=["text_encoder"]), double, 1
    yield "sharded frozen stage", replace(plain, fsdp=True, freeze=["image_encoder.stages.0"]), double, 1
    yield "sharded checkpointed", replace(plain, fsdp=True, grad_checkpointing=["all"]), double, 1


def smooth(dtype):
    """In float32 the projectors' ReLU is a SiLU while this is active."""
    return mock.patch("torch.nn.functional.relu", F.silu) if dtype == torch.float32 else nullcontext()


def settings_of(config, dtype):
    image = replace(MODEL.image, hard_assignment=dtype == torch.float64)
    return replace(MODEL, image=image, logit_bias_init=-10.0 if config.siglip else None)


def start(folder: Path, size: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(distributed.__file__).parents[2]),
    }
    return [
        subprocess.Popen([sys.executable, __file__, str(folder)], env=common | {"RANK": str(rank)})
        for rank in range(size)
    ]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processes = start(folder, request.param)
    assert [process.wait(timeout=300) for process in processes] == [0] * request.param
    return torch.load(folder / "result.pt", weights_only=True)


def distance(found, wanted):
    """Length of the difference of all numbers of two lists of tensors, over the length of the wanted."""
    found, wanted = (torch.cat([value.double().flatten() for value in values]) for values in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def assert_same_run(found, wanted, gradient, weights, each):
    """`gradient` and `weights` bound the `distance` of the first gradient and of the last state, `each` every
    number of that state. The first loss is 1e-6 away at most, those of all steps, which add up what the steps
    before them rounded, 5e-6: they are reported in float32."""
    losses, gradients, state = found
    assert distance([losses[:1]], [wanted[0][:1]]) < 1e-6
    assert distance([losses], [wanted[0]]) < 5e-6
    for values, known, bound in ((gradients, wanted[1], gradient), (state, wanted[2], weights)):
        assert values.keys() == known.keys()
        assert distance(values.values(), [known[name] for name in values]) < bound
    for name, value in wanted[2].items():
        torch.testing.assert_close(
            state[name], value, rtol=each, atol=each, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("name", "config", "dtype"), [case[:3] for case in cases()])
def test_processes_train_as_one_does(several, tmp_path, name, config, dtype):
    """Same losses, same gradients and, after 20 steps, same weights and running statistics."""
    with smooth(dtype):
        wanted = run(tmp_path, config, dtype=dtype, settings=settings_of(config, dtype))
    single = dtype == torch.float32
    assert_same_run(several[name], wanted, *((1e-6, 1e-6, 1e-5) if single else (1e-12, 1e-9, 1e-9)))
    assert several[name][2]["image_projector.norm.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("parts", [2, 4])
def test_pieces_have_the_gradient_of_the_whole_in_double_precision(tmp_path, parts):
    config = replace(CONFIG, clip_grad=0.0)  # the optimiser's divisor is float32
    whole = run(tmp_path, config, dtype=torch.float64, steps=3)
    pieces = run(tmp_path, config, dtype=torch.float64, steps=3, parts=parts)
    assert_same_run(pieces, whole, 1e-12, 1e-9, 1e-9)


def test_pieces_have_the_gradient_of_the_whole_in_float32(tmp_path):
    assert_same_run(run(tmp_path, parts=4, steps=3), run(tmp_path, steps=3), 2e-5, 1e-4, 1e-4)


def test_both_passes_over_a_piece_see_the_same_noise_and_pieces_differ(tmp_path, monkeypatch):
    """Gumbel noise and drop path on: the features of the second pass are those the losses saw."""
    settings = replace(MODEL, image=replace(MODEL.image, drop_path=0.5))
    seen = []
    plain = parallel.GroupViT.encode

    def encode(model, images, texts, noise_key):
        features = plain(model, images, texts, noise_key)
        seen.append((torch.is_grad_enabled(), noise_key.clone(), features.groups.detach().clone()))
        return features

    monkeypatch.setattr(parallel.GroupViT, "encode", encode)
    run(tmp_path, replace(CONFIG, gumbel=True), parts=2, steps=1, settings=settings)
    first, second, again_first, again_second = seen
    assert [one[0] for one in seen] == [False, False, True, True]
    torch.testing.assert_close(first[2], again_first[2])
    torch.testing.assert_close(second[2], again_second[2])
    assert not torch.equal(first[1], second[1])


def test_batches_are_joined_text_by_text():
    loader = iter(Loader(parts=2))
    first, second = next(loader), next(loader)
    joined = accumulation.JoinedBatch.of([first, second])
    assert len(joined.texts) == len(joined.texts.unique(dim=0)) < len(first.texts) + len(second.texts)
    width = joined.texts.shape[1]
    for batch, rows in ((first, slice(0, 16)), (second, slice(16, 32))):
        wanted = torch.nn.functional.pad(batch.texts, (0, width - batch.texts.shape[1]))[batch.text_index]
        assert torch.equal(joined.texts[joined.text_index[rows]], wanted)
        assert torch.equal(joined.images[rows], batch.images)


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder.stages.0", "image_encoder"])
def test_frozen_parts_stay_as_they_are_and_the_rest_moves(tmp_path, part):
    before = dict(create_model(MODEL, seed=0).named_parameters())
    for parts in (1, 2):
        for name, value in run_frozen(tmp_path, [part], parts).items():
            assert torch.equal(value, before[name]) == name.startswith(part), name


def run_frozen(folder, names, parts):
    config = replace(CONFIG, freeze=names, batch_size=IMAGES // parts, accum_freq=parts, eps=1e-8)
    loader = Loader(parts=parts)
    trainer = Trainer(create_model(MODEL, seed=0), loader, config, output=Path(folder))
    batches = accumulation.joined(iter(loader), parts)
    for _ in range(2):
        trainer.train_step(next(batches))
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_checkpointing": ["4"]}, "--grad-checkpointing 4: choose from all, text, image, 1, 2, 3"),
        ({"cuda_graphs": True}, "--cuda-graphs needs a GPU"),
    ],
)
def test_what_can_not_be_is_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Trainer(create_model(MODEL), Loader(), replace(CONFIG, **options), output=tmp_path)


@pytest.mark.parametrize("names", [["all"], ["text"], ["2"], ["1", "3"]])
def test_checkpointed_layers_give_the_same_and_only_they_are_computed_twice(tmp_path, monkeypatch, names):
    settings = replace(MODEL, image=replace(MODEL.image, drop_path=0.5))
    plain = run(tmp_path, steps=2, settings=settings)
    calls = []
    model = create_model(settings)
    for path, module in model.named_modules():
        if type(module).__name__ == "TransformerBlock":
            # before, not after: what is computed again stops once it has what it needs
            module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
    config = replace(CONFIG, grad_checkpointing=names, batch_size=IMAGES)
    trainer = Trainer(model, Loader(), config, output=tmp_path)
    trainer.train_step(next(iter(Loader())))
    twice = {path for path in calls if calls.count(path) == 2}
    wanted = {"1": "stages.0", "2": "stages.1", "3": "stages.2", "text": "text_encoder", "all": "blocks"}
    last = f"text_encoder.blocks.{MODEL.text.layers - 1}"  # computed at the ends of texts alone
    assert twice == {path for path in calls if any(wanted[name] in path for name in names)} - {last}
    again = run(tmp_path, replace(CONFIG, grad_checkpointing=names), steps=2, settings=settings)
    assert torch.equal(again[0], plain[0])
    for name, value in plain[2].items():
        assert torch.equal(again[2][name], value), name


if __name__ == "__main__":
    work(sys.argv[1])
