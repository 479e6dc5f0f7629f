"""From command line and YAML to a `TrainConfig`: the same names, the same checks, one-line errors.

Later beats earlier: the recipe of the preset, the configuration of a run that is continued, `--config
FILE.yaml`, the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from groupvit_fast.console import UserError
from groupvit_fast.training.config import GROUPS, TrainConfig
from groupvit_fast.training.recipes import RECIPES, recipe

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
LENGTHS = ("steps", "epochs", "train_samples")
TYPES = typing.get_type_hints(TrainConfig)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a `UserError` of one line instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str] | None, *, program: str, description: str, epilog: str) -> argparse.Namespace:
    """The options that the command line gives, each only if given, plus `config` and `print_config`."""
    shown = _shown_recipe(argv)
    parser = _Parser(
        prog=program,
        usage=f"{program} [options]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(FIELDS)
    for title, (first, last) in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names[names.index(first) : names.index(last) + 1]:
            _add_option(group, name, getattr(shown, name))
    group = parser.add_argument_group("configuration file")
    group.add_argument(
        "--config",
        metavar="FILE.yaml",
        type=Path,
        help="read options from a YAML file; the names are those of the flags",
    )
    group.add_argument("--print-config", action="store_true", help="print the resolved options and stop")
    group.add_argument(
        "--report",
        metavar="RUN",
        type=Path,
        help="make RUN/report.html again from what the run wrote, and stop",
    )
    given, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument {unknown[0]!r}: every option has a name (--help lists all)")
    if unknown:
        flags = [flag(name) for name in FIELDS] + ["--config", "--print-config", "--report", "--help"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.0)
        raise UserError(f"unknown option {unknown[0]}: did you mean {near[0]}? (--help lists all)")
    return given


def resolve(given: argparse.Namespace, saved: dict[str, Any] | None = None) -> TrainConfig:
    """Merge recipe, `saved` (options of the run that is continued), the YAML file and the command line."""
    layers = [(saved or {}, "the run's config.yaml")]
    if getattr(given, "config", None):
        layers.append((read_yaml(given.config), str(given.config)))
    command_line = {name: value for name, value in vars(given).items() if name in FIELDS}
    layers.append((command_line, ""))
    preset = next((layer["preset"] for layer, _ in reversed(layers) if "preset" in layer), "tiny")
    values = {name: getattr(recipe(preset), name) for name in FIELDS}
    for layer, origin in layers:
        layer = {name: _convert(name, value, origin) for name, value in layer.items()}
        lengths = [name for name in LENGTHS if layer.get(name)]
        if len(lengths) > 1:
            where = origin or " and ".join(map(flag, lengths))
            raise UserError(f"{where}: give {lengths[0]} or {lengths[1]}, not both")
        if lengths:
            values |= dict.fromkeys(LENGTHS)
        layer["model"] = values["model"] | layer.get("model", {})
        values |= layer
    return TrainConfig(**values)


def from_values(values: dict[str, Any], origin: str) -> TrainConfig:
    """The configuration that plain `values`, such as those of `to_yaml`, describe; `origin` is for errors."""
    return TrainConfig(**{name: _convert(name, value, origin) for name, value in values.items()})


def read_yaml(path: Path) -> dict[str, Any]:
    """Options from a YAML file, dashes or underscores alike; an unknown key is an error."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        at = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path}: not valid YAML{at}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines such as 'lr: 0.001', found a {type(values).__name__}")
    options = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)
            raise UserError(f"{path}: unknown key {key!r}: did you mean {near[0]!r}?")
        options[name] = value
    return options


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `read_yaml` reads back to an equal one."""
    plain = {name: getattr(config, name) for name in FIELDS}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown_recipe(argv: Sequence[str] | None) -> TrainConfig:
    """The recipe whose values `--help` shows as defaults: that of `--preset`, if it is a known one."""
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", nargs="?")
    name = early.parse_known_args(argv)[0].preset
    return recipe(name if name in RECIPES else "tiny")


def _add_option(group: argparse._ArgumentGroup, name: str, default: Any) -> None:
    metadata = FIELDS[name].metadata
    shown = default not in (None, [], {}) and "default" not in metadata["help"]
    text = metadata["help"].replace("%", "%%") + (f" (default: {default})" if shown else "")
    kind = _plain_type(name)
    if kind is bool:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        return
    # "--data a b" and "--data a --data b" are the same
    repeatable = {list: {"action": "extend", "nargs": "+"}, dict: {"action": "append"}}.get(kind, {})
    metavar = metadata["metavar"] or {int: "N", float: "X"}.get(kind, "NAME")
    if metadata["choices"]:
        metavar = "|".join(metadata["choices"])
    group.add_argument(flag(name), dest=name, metavar=metavar, help=text, **repeatable)


def _plain_type(name: str) -> type:
    """The type of a field without `None` and without what its items are."""
    hint = TYPES[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _optional(name: str) -> bool:
    return type(None) in typing.get_args(TYPES[name])


def _convert(name: str, value: Any, origin: str) -> Any:
    """Turn a YAML value or a command-line word into the field's type; `origin` names the file in errors."""
    where = f"{origin}: {name}" if origin else flag(name)
    if _optional(name) and (value is None or value == "none"):
        return None
    kind = _plain_type(name)
    choices = FIELDS[name].metadata["choices"]
    try:
        if kind is bool:
            converted = value if isinstance(value, bool) else _fail()
        elif kind is int:
            converted = _whole_number(value)
        elif kind is float:
            converted = _fail() if isinstance(value, bool) else float(value)
        elif kind is list:
            (item_type,) = typing.get_args(TYPES[name])
            converted = [item_type(item) for item in (value if isinstance(value, list) else [value])]
        elif kind is dict:
            converted = _settings(value)
        else:
            converted = kind(value) if isinstance(value, (str, int, Path)) else _fail()
    except (TypeError, ValueError):
        wanted = {
            list: "a list of numbers",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            dict: "KEY=VALUE",
        }
        raise UserError(f"{where}: {value!r} is not {wanted.get(kind, 'a text')}") from None
    if choices and converted not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
        raise UserError(f"{where}: {value!r} is not one of {', '.join(choices)}; did you mean {near[0]}?")
    return converted.expanduser() if isinstance(converted, Path) else converted


def _fail() -> NoReturn:
    raise ValueError


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        _fail()
    return int(value)


def _settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"image": {"tau": 1}}` or `["image.tau=1"]` -> `{"image.tau": 1}`."""
    if isinstance(value, list):
        pairs = [item.partition("=") for item in value]
        if not all(equals and key for key, equals, _ in pairs):
            _fail()
        return {key.strip(): _yaml_value(text) for key, _, text in pairs}
    flat = {}
    for key, item in value.items() if isinstance(value, dict) else _fail():
        flat |= _settings(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _yaml_value(text: str) -> Any:
    """`0.5`, `1e-3`, `[6, 3]`, `true` or a word; YAML 1.1 alone would read 1e-3 as a word."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
