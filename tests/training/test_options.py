"""One list of options for the command line, YAML and --help; mistakes are one line with the nearest name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from groupvit_fast.console import UserError
from groupvit_fast.training import options
from groupvit_fast.training.config import GROUPS, TrainConfig
from groupvit_fast.training.recipes import RECIPES, model_config, recipe


def resolve(*argv, saved=None):
    return options.resolve(options.parse(argv, program="train", description="", epilog=""), saved)


def test_without_options_it_is_the_tiny_recipe():
    assert resolve() == recipe("tiny")


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_has_a_model_and_survives_yaml(name, tmp_path):
    config = resolve("--preset", name)
    assert config == recipe(name)
    assert config.preset == name
    assert model_config(config).multi_label_logit_scale == (config.multi_label > 0)
    path = tmp_path / "config.yaml"
    path.write_text(options.to_yaml(config))
    assert resolve("--config", str(path)) == config


def test_every_option_round_trips_through_yaml(tmp_path):
    """A value other than the default for each field, so that a forgotten one would show."""
    changed = {}
    for name, field in options.FIELDS.items():
        value = getattr(recipe("tiny"), name)
        kind = options._plain_type(name)
        if field.metadata["choices"]:
            changed[name] = field.metadata["choices"][-1]
        elif kind is bool:
            changed[name] = not value
        elif name == "data_weights":
            changed[name] = [1.0, 2.5]
        elif kind in (int, float):
            changed[name] = kind(value or 0) + kind(1)
        else:
            changed[name] = {list: ["a", "b"], dict: {"image.tau": 0.5}, Path: Path("x/y")}.get(kind, "word")
    changed |= {"preset": "groupvit-1stage", "beta1": 0.5, "beta2": 0.6, "min_crop": 0.3, "epochs": None}
    changed |= {"train_samples": None, "layer_decay": 0.5, "model_ema_decay": 0.9}
    config = TrainConfig(**changed)
    path = tmp_path / "config.yaml"
    path.write_text(options.to_yaml(config))
    assert resolve("--config", str(path)) == config


def test_every_option_is_in_help_once(capsys):
    with pytest.raises(SystemExit) as leaving:
        resolve("--help")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for name in options.FIELDS:
        assert len(re.findall(rf"\n  {options.flag(name)}[ ,]", text)) == 1, name
    assert len({name for pair in GROUPS.values() for name in pair}) == 2 * len(GROUPS)


def test_help_shows_the_values_of_the_named_preset(capsys):
    with pytest.raises(SystemExit):
        resolve("--preset", "groupvit-gcc-yfcc", "--help")
    assert "(default: 4096)" in capsys.readouterr().out


def test_later_layers_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nbatch-size: 8\nmodel: {image: {tau: 0.5, heads: 4}}\ndata: one.tar\n")
    config = resolve("--config", str(path), "--batch-size", "16", "--model", "image.tau=2", "--amp",
                     saved={"lr": 5e-4, "seed": 9})  # fmt: skip
    assert (config.lr, config.batch_size, config.seed, config.amp) == (1e-4, 16, 9, True)
    assert config.model == {"image.tau": 2, "image.heads": 4}
    assert config.data == ["one.tar"]


def test_steps_replace_epochs_and_the_other_way_round():
    assert resolve("--epochs", "2").steps is None
    assert resolve("--preset", "groupvit-gcc-yfcc", "--steps", "10").epochs is None
    assert resolve("--warmup-steps", "none").warmup_steps is None


def test_model_settings_reach_the_model():
    config = resolve(
        "--model", "image.depths=[1, 1]", "--model", "text.width=32", "--model", "logit_scale_init=1e0"
    )
    model = model_config(config)
    assert (model.image.depths, model.text.width, model.logit_scale_init) == ((1, 1), 32, 1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--presett", "x"], "unknown option --presett: did you mean --preset"),
        (["--batchsize=3"], "unknown option --batchsize=3: did you mean --batch-size"),
        (["--step", "3"], "unknown option --step: did you mean --steps"),
        (["data"], "unexpected argument 'data'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--preset", "groupvit-yfcc"], "unknown preset 'groupvit-yfcc': did you mean 'groupvit-gcc-yfcc'"),
        (["--steps", "3.5"], "--steps: '3.5' is not a whole number"),
        (["--steps", "0"], "--steps is 0, but it must be more than 0"),
        (["--steps", "5", "--epochs", "1"], "give steps or epochs, not both"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--lr", "-1"], "--lr is -1.0, but it must be more than 0"),
        (["--device", "gpu"], "'gpu' is not one of auto, cpu, cuda"),
        (["--amp-dtype", "bf15"], "did you mean bf16"),
        (["--model", "image.tau"], "is not KEY=VALUE"),
        (["--config", "/absent.yaml"], "no such file"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError) as mistake:
        resolve(*argv)
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate': did you mean"),
        ("batch-sise: 1", "unknown key 'batch-sise': did you mean 'batch_size'"),
        ("- lr", "expected lines such as"),
        ("lr: [1", "not valid YAML (line 1)"),
        ("lr: true", "lr: True is not a number"),
        ("amp: 1", "amp: 1 is not true or false"),
        ("steps: 1.5", "steps: 1.5 is not a whole number"),
        ("steps: 1\nepochs: 1", "give steps or epochs"),
        ("output: [1]", "output: [1] is not a text"),
        ("model: 3", "model: 3 is not KEY=VALUE"),
    ],
)
def test_mistakes_in_yaml_name_the_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as mistake:
        resolve("--config", str(path))
    assert message in str(mistake.value)
    assert str(path) in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("image.ta=1", "did you mean image.tau?"),
        ("tau=1", "the model has no such setting"),
        ("image.heads=5", "not a multiple"),
        ("image.width=word", "--model: "),
    ],
)
def test_mistakes_in_model_settings(setting, message):
    with pytest.raises(UserError) as mistake:
        model_config(resolve("--model", setting))
    assert message in str(mistake.value)


def test_lists_take_several_words_and_repeats():
    config = resolve("--data", "a.tar", "b.tar", "--data", "c.tar", "--data-weights", "1", "2.5", "0")
    assert config.data == ["a.tar", "b.tar", "c.tar"]
    assert config.data_weights == [1.0, 2.5, 0.0]
    with pytest.raises(UserError, match=r"--data-weights: .* is not a list of numbers"):
        resolve("--data-weights", "much")


def test_the_list_of_options_is_pinned():
    """A flag that appears or goes is a change of the interface: say so here as well."""
    pinned = """
        preset model data data_weights allow_missing shard_cache shard_cache_gb data_root
        shapes_train shapes_val shapes_seed min_crop flip aa color_jitter reprob prompt_templates
        noun_tags prompt_fill workers steps epochs train_samples accum_freq batch_size optimizer lr
        lr_batch min_lr warmup_lr warmup_steps warmup_epochs weight_decay beta1 beta2 eps clip_grad
        layer_decay freeze model_ema model_ema_decay multi_label contrastive_weight
        multi_label_weight multi_label_match merge_captions siglip local_loss gather_with_grad
        gumbel amp amp_dtype compile fsdp cuda_graphs grad_checkpointing deterministic max_bad_steps
        max_rewinds timeout_seconds eval_data eval_dataset eval_protocol eval_background_threshold
        eval_every save_every keep_checkpoints save_every_minutes log_every report_to profile_steps
        dry_run world_size measured output resume device seed seed_sweep json quiet
    """
    assert [field.name for field in dataclasses.fields(TrainConfig)] == pinned.split()


def test_yaml_of_a_configuration_is_plain():
    values = yaml.safe_load(
        options.to_yaml(TrainConfig(output=Path("a b/ü"), model={"image.depths": [1, 2]}))
    )
    assert values["output"] == "a b/ü"
    assert list(values) == list(options.FIELDS)
