"""Training with --fsdp on two gloo processes: shares, what is saved, resumed, skipped, evaluated and sent.

That losses, gradients and weights are those of one process: `test_parallel.py`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import launch
from small_run import CONFIG, MODEL, Loader, nan_pixels, resumed, trainer

from groupvit_fast.console import UserError
from groupvit_fast.model import load_model
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.training import accumulation, checkpoint, distributed, plan, sharding
from groupvit_fast.training.recipes import recipe

SIZE = 2
SHARDED = replace(CONFIG, fsdp=True, model_ema=True, eps=1e-3)
COPIED = replace(SHARDED, fsdp=False)


def digest(values) -> str:
    return hashlib.sha256(b"".join(values)).hexdigest()


def whole_bits(run) -> list[bytes]:
    """Weights, averaged weights and moments as a checkpoint has them; empty but on the main process."""
    weights = [*sharding.whole_state(run.model).values(), *sharding.whole_state(run.ema.model).values()]
    moments = run.optimizer.state_dict()["adamw"]["state"]
    moments = [value for state in moments.values() for value in state.values()]
    values = [*weights, *moments] if distributed.rank() == 0 else []
    return [value.detach().numpy().tobytes() for value in values]


def live_bytes() -> int:
    """Memory of all tensors of this process."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        # not isinstance: some of torch's own objects warn about it
        if issubclass(type(one), torch.Tensor) and not sharding.sharded(one):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def stepped(folder, config, world, steps=1, spoil=None, **options):
    run = trainer(Path(folder), config, Loader(spoil), world=world, **options)
    batches = iter(run.loader)
    for _ in range(steps):
        run.train_step(next(batches))
    return run


def shares(folder, world):
    """Memory that a run has after a step, sharded and not: what `live_bytes` finds, less what was there."""
    found = {}
    for name, config in (("copied", COPIED), ("sharded", SHARDED)):
        before = live_bytes()
        run = stepped(folder, config, world)
        run.last_batch = None
        found[name] = live_bytes() - before
        if name == "sharded":
            own = [sharding.own(parameter) for parameter in run.model.parameters()]
            moments = [v for state in run.optimizer.adamw.state.values() for v in state.values() if v.dim()]
            found["numbers"] = [sum(value.numel() for value in values) for values in (own, moments)]
            largest = [sharding.largest_share(parameter, SIZE) for parameter in run.model.parameters()]
            found["planned"] = sum(largest)
        del run
    return found


def bad_step(folder, world):
    """One rank's pixels are not finite: no share of anybody moves, and both count it."""
    spoil = {1: nan_pixels} if world.rank == 1 else {}
    run = stepped(folder, SHARDED, world, spoil=spoil)
    batches = iter(run.loader)
    before = own_bits(run)
    run.train_step(next(batches))
    same, counted = own_bits(run) == before, run.optimizer.bad_steps.item()
    run.train_step(next(batches))
    return {"same": same, "counted": counted, "moved": own_bits(run) != before}


def own_bits(run):
    values = [*run.model.state_dict().values(), *run.ema.model.state_dict().values()]
    moments = [value for state in run.optimizer.adamw.state.values() for value in state.values()]
    return [sharding.own(value).detach().numpy().tobytes() for value in [*values, *moments]]


def diagnosis(folder, world):
    spoil = dict.fromkeys(range(3, 40), nan_pixels) if world.rank == 1 else {}
    run = trainer(Path(folder), replace(SHARDED, max_rewinds=0), Loader(spoil), world=world)
    with pytest.raises(UserError) as error:
        run.fit()
    return str(error.value)


def fitted(folder, config, world, **options):
    run = trainer(Path(folder), config, world=world, **options)
    run.fit()
    return run


def resuming(folder, world):
    """A run with --fsdp, whole; stopped by a signal in its seventh step and continued with and without."""
    folder, found = Path(folder), {}
    whole = fitted(folder / "whole", SHARDED, world)
    found["whole"] = digest(own_bits(whole)), digest(whole_bits(whole))
    signals = {6: lambda batch: os.kill(os.getpid(), signal.SIGTERM)} if world.rank == 1 else {}
    stopped = trainer(folder / "stopped", SHARDED, Loader(signals), world=world)
    found["signal"], found["step"] = stopped.fit(), stopped.step
    found["stopped"] = digest(whole_bits(stopped))
    distributed.barrier()
    for name, config in (("copied", COPIED), ("sharded", SHARDED)):
        again = resumed(folder / "stopped", config=config, world=world)
        found[name] = digest(whole_bits(again))
        again.config = replace(config, save_every=100)
        if name == "sharded":
            again.fit()
            found["continued"] = digest(own_bits(again)), digest(whole_bits(again))
        else:
            run = again
            for batch, _ in zip(iter(run.loader), range(SHARDED.steps - run.step), strict=False):
                run.train_step(batch)
            found["copied weights"] = [value.tolist() for value in sharding.whole_state(run.model).values()]
        distributed.barrier()
    found["whole weights"] = [value.tolist() for value in sharding.whole_state(whole.model).values()]
    one = resumed(folder / "single", config=SHARDED, world=world)
    found["of one process"] = digest(whole_bits(one))
    return found


def evaluating(folder, world):
    """Evaluation on the main process with whole weights, also when a signal ends it."""
    folder, seen, scores = Path(folder), [], iter([0.1, 0.2, 0.5, 0.2, 0.3, 0.1, 0.1, 0.1])

    def evaluate(model):
        assert world.is_main
        assert not model.training
        assert not any(sharding.sharded(parameter) for parameter in model.parameters())
        model.encode_groups(torch.zeros(2, 3, 16, 16))
        seen.append(digest(value.numpy().tobytes() for value in model.state_dict().values()))
        return {"miou": next(scores)}

    config = replace(SHARDED, eval_every=4, save_every=5)
    run = trainer(folder / "run", config, world=world, evaluate=evaluate)
    run.fit()
    last = [sharding.whole_state(model) for model in (run.model, run.ema.model)]
    found = {
        "evaluations": {step: result["ema"]["miou"] for step, result in run.evaluations.items()},
        "seen": seen[-2:],
        "last": [digest(value.numpy().tobytes() for value in state.values()) for state in last],
        "training": run.model.training,
    }
    if world.is_main:
        kept = run.evaluated_model.state_dict()
        found["kept"] = digest(value.numpy().tobytes() for value in kept.values())

    def ends(model):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    ended = trainer(folder / "ended", config, world=world, evaluate=ends)
    found["ended"] = ended.fit(), ended.step
    return found


def variants(folder, world):
    """Largest difference of a weight between --fsdp and DDP after three steps.

    Assignment is soft: rounding turns a hard one over now and then.
    """
    soft = replace(MODEL, image=replace(MODEL.image, hard_assignment=False))
    cases = {
        "bf16": (SHARDED, {"dtype": "bf16"}),
        "groups": (
            replace(SHARDED, multi_label_match="group"),
            {"settings": replace(soft, projector_layers=1)},
        ),
        "layer decay": (replace(SHARDED, layer_decay=0.7), {}),
    }
    found = {}
    for name, (config, options) in cases.items():
        options = {"settings": soft} | options
        runs = [stepped(folder, replace(config, fsdp=on), world, 3, **options) for on in (False, True)]
        plain, split = (sharding.whole_state(run.model) for run in runs)
        found[name] = max(((plain[key] - split[key]).abs().max().item() for key in plain), default=0.0)
        assert any(map(sharding.sharded, runs[1].model.parameters()))
        assert {sharding.own(p).dtype for p in runs[1].model.parameters()} == {torch.float32}
    return found


def messages(folder, world):
    """Bytes that a step sends as weights and as gradients, by what the collectives are called with."""
    found = {}
    for pieces in (1, 2):
        config = replace(SHARDED, model_ema=False, accum_freq=pieces)
        run = trainer(Path(folder), config, Loader(), world=world)
        batches = accumulation.joined(iter(run.loader), pieces)
        run.train_step(next(batches))  # the first step also sets up
        sent = {"weights": 0, "gradients": 0}
        with pytest.MonkeyPatch.context() as patch:
            for kind, names in (("weights", GATHERS), ("gradients", SCATTERS)):
                for name in names:
                    if hasattr(dist, name):
                        patch.setattr(dist, name, counting(getattr(dist, name), sent, kind))
            run.train_step(next(batches))
        needs = plan.needs_of_shares(run.model, SIZE, pieces)
        found[pieces] = sent, [needs.weight_traffic, needs.gradient_traffic]
    return found


GATHERS, SCATTERS = ("all_gather_single", "all_gather_into_tensor"), (
    "reduce_scatter_single", "reduce_scatter_tensor",
)  # fmt: skip


def counting(collective, sent, kind):
    def counted(output, input, *arguments, **options):
        # a process sends its share to everybody, and of a gradient everybody's share but its own
        share = input if kind == "weights" else output
        sent[kind] += share.numel() * share.element_size() * (SIZE - 1)
        return collective(output, input, *arguments, **options)

    return counted


PARTS = (shares, bad_step, diagnosis, resuming, evaluating, variants, messages)


def work(folder: str) -> None:
    """What one of the processes does: this file run as a program."""
    torch.set_num_threads(1)
    with distributed.session("cpu") as world:
        found = {}
        for part in PARTS:
            place = Path(folder, part.__name__)
            place.mkdir(exist_ok=True)
            distributed.barrier()
            found[part.__name__] = part(place, world)
        Path(folder, f"rank_{world.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the processes found, by part and rank; before it, a run of one process for them to continue."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "resuming").mkdir()
    single = trainer(folder / "resuming" / "single", replace(SHARDED, steps=3))
    single.fit()
    processes = launch(__file__, folder, count=SIZE)
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * SIZE, said
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(SIZE)]
    return {"folder": folder, "single": single} | {
        part.__name__: [rank[part.__name__] for rank in ranks] for part in PARTS
    }


def test_a_process_keeps_its_share_of_parameters_gradients_moments_and_average(found):
    model = create_model(MODEL)
    total = sum(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 0)
    for rank in found["shares"]:
        assert rank["numbers"] == [pytest.approx(total / SIZE, rel=1e-3), pytest.approx(total, rel=1e-3)]
        assert max(rank["numbers"][0], rank["numbers"][1] / 2) <= rank["planned"]
        assert 5 * 4 * total < rank["copied"] < 5.3 * 4 * total
        assert rank["sharded"] < 0.51 * rank["copied"]
    assert sum(rank["numbers"][0] for rank in found["shares"]) == total + (SIZE - 1) * whole


def test_a_bad_step_on_one_rank_is_skipped_on_all(found):
    assert [rank["same"] for rank in found["bad_step"]] == [True] * SIZE
    assert [rank["counted"] for rank in found["bad_step"]] == [1] * SIZE
    assert all(rank["moved"] for rank in found["bad_step"])


def test_many_bad_steps_are_traced_to_the_rank(found):
    first, second = found["diagnosis"]
    assert first == second
    assert "5 steps in a row" in first
    assert "first in the pixels of sample batch7/2 on rank 1" in first


def test_a_stopped_run_continues_to_the_bit(found):
    for rank in found["resuming"]:
        assert rank["signal"] == signal.SIGTERM
        assert 7 <= rank["step"] < SHARDED.steps
        assert rank["sharded"] == rank["stopped"]
        assert rank["continued"] == rank["whole"]


def test_checkpoints_are_the_same_with_and_without_sharding(found):
    """Weights, averages and moments in DDP and in one process are those that were saved; training goes on."""
    main = found["resuming"][0]
    assert main["copied"] == main["stopped"] == main["sharded"]
    for copied, whole in zip(main["copied weights"], main["whole weights"], strict=True):
        torch.testing.assert_close(torch.tensor(copied), torch.tensor(whole), rtol=1e-4, atol=1e-5)
    assert main["of one process"] == digest(whole_bits(found["single"]))
    stopped = found["folder"] / "resuming" / "stopped" / "checkpoints"
    alone = trainer(found["folder"] / "alone", SHARDED)
    alone.resume(checkpoint.step_folder(stopped, main["step"]), lambda line: None)
    assert digest(whole_bits(alone)) == main["stopped"]
    alone.fit()
    assert alone.step == SHARDED.steps


def test_whole_weights_are_evaluated_on_the_main_process(found):
    main, other = found["evaluating"]
    assert main["evaluations"] == {"0": 0.2, "4": 0.2, "8": 0.1, "12": 0.1}
    assert main["evaluations"] == other["evaluations"]
    assert main["seen"] == main["last"]
    assert main["kept"] == main["last"][1]
    assert main["ended"] == other["ended"] == [signal.SIGTERM, 0]
    run = found["folder"] / "evaluating" / "run" / "checkpoints"
    assert [folder.name for folder in checkpoint.list_steps(run)] == [
        "step_00000004", "step_00000010", "step_00000012",
    ]  # fmt: skip
    assert os.readlink(run / "best") == "step_00000004"
    saved = load_model(run / "step_00000012").state_dict().values()
    assert digest(value.numpy().tobytes() for value in saved) == main["last"][0]


def test_variants_train_as_with_copies(found):
    for name, difference in found["variants"][0].items():
        assert difference < 1e-4, name


def test_the_plan_counts_what_is_sent(found):
    for rank in found["messages"]:
        for pieces, (sent, planned) in rank.items():
            assert [sent["weights"], sent["gradients"]] == pytest.approx(planned, rel=1e-3), pieces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "--fsdp and --compile exclude each other"),
        ({"cuda_graphs": True}, "--fsdp and --cuda-graphs exclude each other"),
        ({"optimizer": "apex-lamb"}, "--fsdp and --optimizer apex-lamb exclude each other"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, options, message):
    config = replace(SHARDED, **options)
    with pytest.raises(UserError, match=message):
        sharding.wanted(config)
    with pytest.raises(UserError, match=message):
        plan.make_plan(replace(config, model=recipe("tiny").model, preset="tiny"))


if __name__ == "__main__":
    work(sys.argv[1])
