"""Reading and writing checkpoints: every layout, damage, atomicity."""

import errno
import json
import os
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close
from transformers import AutoImageProcessor, GroupViTModel

import groupvit_fast
from groupvit_fast.model.checkpoint_config import CheckpointError
from groupvit_fast.model.checkpoint_files import load_model, read_checkpoint
from groupvit_fast.model.checkpoint_keys import from_ours
from groupvit_fast.model.checkpoint_write import write_checkpoint
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ModelConfig, TextConfig, preset


@pytest.fixture
def model(small_config):
    """A small model whose every number is random, batch-norm statistics included."""
    model = create_model(small_config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + 0.1)
            else:
                value.fill_(7)
    return model


@pytest.fixture
def official_file(tmp_path):
    """A function: an official .pth of random numbers with heads of 64, made from the key map alone."""

    def build(**extra):
        config = replace(preset("groupvit-gcc-yfcc"), projector_hidden=96)
        image = replace(config.image, width=128, heads=2, depths=(2, 1, 1), image_size=64)
        config = replace(config, image=image, text=TextConfig(width=64, heads=1, layers=2, vocab_size=200))
        state = create_model(config, seed=3).state_dict()
        torch.save({"model": from_ours(state, "official"), "epoch": 29, **extra}, tmp_path / "official.pth")
        return tmp_path / "official.pth", config, state

    return build


def assert_equal_states(found, wanted):
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert different == []


def test_our_directory_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "ours", about={"data": "ten drawings"})
    loaded = groupvit_fast.load_model(tmp_path / "ours")
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert "ten drawings" in (tmp_path / "ours" / "README.md").read_text()
    assert sorted(item.name for item in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_other_layouts_round_trip(model, tmp_path, layout):
    target = tmp_path / ("there" if layout == "hf" else "there.pth")
    write_checkpoint(model.state_dict(), model.config, target, layout=layout)
    back = read_checkpoint(target)
    assert back.layout == layout
    assert back.config == model.config
    assert back.about == {"origin": "ours"}
    assert_equal_states(back.state, model.state_dict())


@torch.no_grad()
def test_hugging_face_loads_what_we_write(model, tmp_path, token_rows):
    write_checkpoint(model.state_dict(), model.config, tmp_path / "hf", layout="hf")
    theirs, info = GroupViTModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    theirs = theirs.eval().double()
    pixels = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    tokens = token_rows(model.config.text, [4, 9])
    model.double()
    assert_close(model.encode_image(pixels), theirs.get_image_features(pixels).pooler_output)
    assert_close(model.encode_text(tokens), theirs.get_text_features(tokens).pooler_output)


def test_image_processor_has_imagenet_statistics(model, tmp_path):
    write_checkpoint(model.state_dict(), model.config, tmp_path / "hf", layout="hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    assert dict(processor.crop_size) == {"height": 48, "width": 48}


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_directory_of_hugging_face(
    random_hf_model, small_hf_config, small_config, tmp_path, token_rows, safe
):
    theirs = random_hf_model(small_hf_config)
    theirs.save_pretrained(tmp_path / "hf")
    if not safe:
        torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
        (tmp_path / "hf" / "model.safetensors").unlink()
    ours = load_model(tmp_path / "hf")
    assert ours.config == replace(
        small_config, multi_label_logit_scale=False, logit_scale_init=ours.config.logit_scale_init
    )
    pixels, tokens = torch.randn(2, 3, 48, 48), token_rows(small_config.text, [4, 9])
    assert_close(
        ours.encode_image(pixels), theirs.get_image_features(pixels).pooler_output, atol=1e-5, rtol=0
    )
    assert_close(ours.encode_text(tokens), theirs.get_text_features(tokens).pooler_output, atol=1e-5, rtol=0)


def test_hugging_face_configuration_with_other_maths_is_refused(random_hf_model, small_hf_config, tmp_path):
    random_hf_model(small_hf_config).save_pretrained(tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    values["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="hidden_act = relu"):
        load_model(tmp_path / "hf")


def test_official_file(official_file):
    path, config, state = official_file()
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.about == {"origin": "official", "source": "official.pth"}
    assert_equal_states(checkpoint.state, state)
    assert_equal_states(load_model(path).state_dict(), state)


def test_official_file_of_wrapped_model(official_file):
    path, _, state = official_file()
    payload = torch.load(path, weights_only=True)
    torch.save({"model": {f"module.{name}": value for name, value in payload["model"].items()}}, path)
    assert_equal_states(read_checkpoint(path).state, state)


def test_keys_do_not_depend_on_wrappers(model, tmp_path):
    compiled = torch.compile(torch.nn.ModuleDict({"module": model}))
    write_checkpoint(compiled.state_dict(), model.config, tmp_path / "wrapped")
    assert_equal_states(load_model(tmp_path / "wrapped").state_dict(), model.state_dict())


def test_run_gives_its_newest_complete_step(model, tmp_path):
    steps = tmp_path / "run" / "checkpoints"
    for step in (5, 10, 900):
        with torch.no_grad():
            model.logit_scale.fill_(step)
        model.save_pretrained(steps / f"step_{step:08d}")
    (steps / "step_00000900" / "model.safetensors").unlink()
    (steps / ".step_00000950").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"miou": 0.41}')
    (tmp_path / "run" / "config.yaml").write_text("steps: 10\n")
    for place in (
        tmp_path / "run",
        steps,
        steps / "step_00000010",
        steps / "step_00000010" / "model.safetensors",
    ):
        assert load_model(place).logit_scale == 10
    assert load_model(steps / "step_00000005").logit_scale == 5
    about = read_checkpoint(tmp_path / "run").about
    assert about["results"] == {"miou": 0.41}
    assert "steps: 10" in about["recipe"]


def test_dtype_and_device(model, tmp_path, device):
    model.half().save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half").logit_scale.dtype is torch.float16
    loaded = load_model(tmp_path / "half", device, torch.float64)
    assert loaded.logit_scale.dtype is torch.float64
    assert loaded.logit_scale.device.type == device
    assert loaded.image_projector.norm.num_batches_tracked.dtype is torch.int64


def damaged(model, path, change):
    """Save `model` with its stored tensors changed by `change`."""
    model.save_pretrained(path)
    state = dict(model.state_dict())
    change(state)
    safetensors.torch.save_file(state, path / "model.safetensors")
    return path


def test_what_does_not_fit_is_listed_shortly(model, tmp_path):
    def change(state):
        for name in [name for name in state if name.startswith("text_encoder.blocks.1")]:
            del state[name]
        state["extra"] = torch.zeros(1)
        state["image_encoder.norm.weight"] = torch.zeros(5)

    path = damaged(model, tmp_path / "odd", change)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "12 missing (text_encoder.blocks.1.norm1.weight" in message
    assert "and 9 more" in message
    assert "1 unexpected (extra)" in message
    assert "image_encoder.norm.weight: [5], expected [32]" in message
    assert "\n" not in message


def test_partial_fills_what_is_missing(model, tmp_path):
    path = damaged(model.half(), tmp_path / "odd", lambda state: state.pop("image_encoder.norm.weight"))
    loaded = load_model(path, partial=True)
    assert torch.equal(loaded.image_encoder.norm.weight, torch.ones(32, dtype=torch.float16))
    assert torch.equal(loaded.logit_scale, model.logit_scale)


def break_weights(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])


def set_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_weights, "can not be read"),
        (lambda path: (path / "config.json").write_text("{"), "can not be read"),
        (lambda path: (path / "config.json").write_text("[]"), "can not be read"),
        (lambda path: set_config(path, version=2), "version 2 is newer"),
        (lambda path: set_config(path, format="x", model_type="clip"), "describes no GroupViT: clip"),
        (lambda path: set_config(path, model={"imge": {}}), "unknown key 'imge'"),
        (lambda path: set_config(path, model={"image": {"depths": [10**9, 3, 3]}}), "claims 10000000"),
        (lambda path: set_config(path, model={"image": {"width": "wide"}}), "can not be read"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no checkpoint"),
    ],
)
def test_damage_is_one_clear_line(model, tmp_path, harm, message):
    model.save_pretrained(tmp_path / "harmed")
    harm(tmp_path / "harmed")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "harmed")
    assert str(tmp_path / "harmed") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model": {"a": torch.ones(1)}}, "no GroupViT checkpoint: it has no img_encoder.pos_embed"),
        ({"epoch": 3}, "holds no state dict"),
        ([1, 2], "holds a list"),
    ],
)
def test_foreign_files_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "file.pth")


def test_missing_place_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(tmp_path)


def test_older_checkpoint_is_replaced_and_other_files_are_not(model, tmp_path):
    target = tmp_path / "out"
    model.save_pretrained(target)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(target)
    assert load_model(target).logit_scale == 3.0
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds other files \(notes.txt\)"):
        model.save_pretrained(target)
    assert (target / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("layout", ["ours", "hf", "official"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_disk_leaves_the_old_checkpoint(monkeypatch, model, tmp_path, layout, call):
    """A full disk at any write, flush or rename: the old checkpoint or the new one, nothing beside it."""
    target = tmp_path / ("out.pth" if layout == "official" else "out")
    state = dict(model.state_dict())
    write_checkpoint(state, model.config, target, layout=layout)
    newer = {**state, "logit_scale": torch.tensor(9.0)}
    original, outcomes = getattr(os, call), []
    for failing in range(1, 12):
        calls = iter(range(1, 1000))

        def fail(*arguments, failing=failing, calls=calls):
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                write_checkpoint(newer, model.config, target, layout=layout)
                outcomes.append("written")
            except CheckpointError as error:
                outcomes.append(str(error).rpartition(": ")[2])
        found = read_checkpoint(target).state["logit_scale"]
        assert found == (9.0 if outcomes[-1] == "written" else state["logit_scale"])
        assert os.listdir(tmp_path) == [target.name]
        if outcomes[-1] == "written":
            break
    assert set(outcomes[:-1]) == {"No space left on device"}
    assert outcomes[-1] == "written"


@pytest.mark.parametrize(
    ("knobs", "layouts"),
    [
        ({"token_residual": False}, ("hf", "official")),
        ({"pre_assign_attention": False}, ("hf", "official")),
        ({"assign_scale": 3.0}, ("hf", "official")),
        ({"tau": 0.5}, ("hf", "official")),
        ({"hard_assignment": False}, ("hf", "official")),
        ({"assign_eps": 0.5}, ("official",)),
        ({"output_groups": (4, 3)}, ("hf",)),
    ],
)
def test_model_that_a_layout_can_not_express_is_refused(small_config, tmp_path, knobs, layouts):
    config = replace(small_config, image=replace(small_config.image, **knobs))
    state = create_model(config, seed=0).state_dict()
    for layout in ("hf", "official"):
        target = tmp_path / layout
        if layout in layouts:
            with pytest.raises(CheckpointError, match=next(iter(knobs))):
                write_checkpoint(state, config, target, layout=layout)
            assert not target.exists()
        else:
            write_checkpoint(state, config, target, layout=layout)
            assert read_checkpoint(target).config == config


def test_card_keeps_the_licence_of_released_weights(official_file, tmp_path):
    """Through every layout and back, a card of foreign weights says non-commercial."""
    path, _, _ = official_file()
    for place, layout in (("ours", "ours"), ("hf", "hf"), ("again.pth", "official"), ("back", "ours")):
        checkpoint = read_checkpoint(path)
        path = tmp_path / place
        write_checkpoint(checkpoint.state, checkpoint.config, path, layout=layout, about=checkpoint.about)
        if path.is_dir():
            assert "**non-commercial use only**" in (path / "README.md").read_text()
    assert read_checkpoint(path).about["origin"] == "official"


def test_card_of_the_released_architecture_has_data_and_published_scores(tmp_path):
    from groupvit_fast.model.model_card import model_card

    card = model_card(ModelConfig(), {"origin": "official"}, "ours")
    assert "14,615,499" in card
    assert (
        "| official | Pascal VOC 2012 | 52.3 | published for the released weights, not measured here |"
        in card
    )
    own = model_card(ModelConfig(), {"results": {"miou": 0.4137}, "recipe": {"steps": 5}}, "ours")
    assert "52.3" not in own
    assert "| 41.4 | measured |" in own
    assert '"steps": 5' in own
