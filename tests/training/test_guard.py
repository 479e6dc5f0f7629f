"""Bad numbers from anywhere: skipped, then another try with other data, then a stop that says why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from small_run import CONFIG, Loader, bits, metrics, nan_pixels, resumed, trainer

from groupvit_fast.console import UserError
from groupvit_fast.training import guard, replay

LONG = replace(CONFIG, steps=30, max_rewinds=0)


def stopped(run):
    with pytest.raises(UserError) as stop:
        run.fit()
    message = str(stop.value)
    assert "\n" not in message
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    bundle = re.search(r"repeats the step from (.*\.pt)", message)[1]
    return message, bundle


def test_bad_pixels_are_named_with_their_sample(tmp_path):
    message, bundle = stopped(trainer(tmp_path, LONG, Loader(dict.fromkeys(range(7, 20), nan_pixels))))
    assert re.search(r"step 12: 5 steps in a row.*step 7 are kept.*step_00000006", message)
    assert "first in the pixels of sample batch11/2" in message
    finding, samples = replay.replay(bundle)
    assert finding.place == "the pixels of sample batch11/2"
    assert finding.samples == ("batch11/2",)
    assert samples == [f"batch11/{row}" for row in range(6)]


def test_a_bad_module_is_named(tmp_path):
    """An overflow inside the model: the first module that shows it, and the same one when repeated."""
    run = trainer(tmp_path, LONG)
    with torch.no_grad():
        run.model.text_encoder.get_parameter("token_embedding.weight").fill_(torch.finfo().max)
    message, bundle = stopped(run)
    assert "first in the output of text_encoder" in message
    assert replay.replay(bundle)[0].place in message


@pytest.mark.parametrize("part", [0, 1])
def test_a_bad_loss_part_is_named(tmp_path, part):
    run = trainer(tmp_path, LONG)
    plain = run.losses

    def losses(*arguments):
        values = list(plain(*arguments)[1:])
        values[part] = values[part] * float("inf")
        return values[0] + values[1], *values

    run.losses = losses
    assert f"first in {guard.PARTS[part + 1]}" in stopped(run)[0]


def test_a_bad_gradient_is_named_by_its_parameter(tmp_path):
    run = trainer(tmp_path, LONG)
    spoil = run.model.get_parameter("text_projector.hidden.weight")
    spoil.register_hook(lambda gradient: gradient * float("nan"))
    assert "first in the gradient of text_projector.hidden.weight" in stopped(run)[0]


def test_a_fault_that_is_gone_when_repeated_is_called_so(tmp_path, monkeypatch):
    run = trainer(tmp_path, LONG)
    spoiling = [True]
    run.model.logit_scale.register_hook(lambda g: g * float("nan") if spoiling[0] else g)
    diagnose = guard.diagnose
    monkeypatch.setattr(
        guard, "diagnose", lambda trainer: (spoiling.clear(), spoiling.append(False), diagnose(trainer))[-1]
    )
    assert "a fault that comes and goes" in stopped(run)[0]


def test_other_data_after_a_rewind(tmp_path):
    """Batches 7 to 11 are bad: at step 12 back to the weights of step 6, on with batch 12."""
    loader = Loader(dict.fromkeys(range(7, 12), nan_pixels))
    run = trainer(tmp_path / "a", replace(CONFIG, steps=20), loader)
    noise = []
    plain = run.forward
    run.forward = lambda *a, **o: (noise.append((run.step, a[3].tolist())), plain(*a, **o))[1]
    assert run.fit() is None
    assert run.recovery.rewinds == 1
    assert loader.position == 12 + 14
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    assert lines[-1]["bad_steps"] == 5
    first, second = (key for step, key in noise if step == 6)
    assert first != second
    assert len(list((tmp_path / "a" / "checkpoints").glob("step_*"))) == 2


def test_a_run_killed_after_a_rewind_continues_exactly(tmp_path):
    spoil = dict.fromkeys(range(7, 12), nan_pixels)
    config = replace(CONFIG, steps=20)
    whole = trainer(tmp_path / "whole", config, Loader(spoil))
    whole.fit()

    def die(batch):
        raise RuntimeError("killed")

    for moment in (11, 12, 14, 19):
        folder = tmp_path / str(moment)
        with pytest.raises(RuntimeError, match="killed"):
            trainer(folder, config, Loader(spoil | {moment: die})).fit()
        last = resumed(folder, config=config, loader=Loader(spoil))
        last.fit()
        assert bits(last) == bits(whole)
        assert metrics(folder) == metrics(tmp_path / "whole")


def test_rewinds_are_limited_and_a_checkpoint_in_trouble_is_no_refuge(tmp_path):
    """Step 12 is saved in the middle of bad steps: each rewind leads to step 6."""
    config = replace(CONFIG, steps=60, max_rewinds=2, max_bad_steps=7, log_every=14)
    run = trainer(tmp_path, config, Loader(dict.fromkeys(range(7, 200), nan_pixels)))
    message, _ = stopped(run)
    assert "after 2 rewinds" in message
    assert run.step == 14
    assert "pixels of sample batch29/2" in message
    assert run.recovery.checkpoint.name == "step_00000012"


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    run = trainer(tmp_path, CONFIG, Loader(dict.fromkeys(range(20), nan_pixels)))
    message, _ = stopped(run)
    assert "step 4: 4 steps in a row" in message
    assert run.recovery.rewinds == 0
