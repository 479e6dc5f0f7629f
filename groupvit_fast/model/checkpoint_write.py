"""Write checkpoints in any of the three layouts; a reader sees a whole one or none."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from groupvit_fast.console import write_bytes_atomically
from groupvit_fast.model.checkpoint_config import (
    FORMAT,
    CheckpointError,
    hf_json,
    our_json,
    refuse_unfaithful,
)
from groupvit_fast.model.checkpoint_keys import from_ours
from groupvit_fast.model.model_card import model_card
from groupvit_fast.model.presets import ModelConfig

_FILES = frozenset({"model.safetensors", "config.json", "README.md", "preprocessor_config.json"})
HF_EXTRA = ("multi_label_logit_scale",)
"""Parameters that Hugging Face's model lacks; its directories keep their value in config.json."""
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def write_checkpoint(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    target: str | Path,
    *,
    layout: str = "ours",
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write our state dict as `layout`: a directory for ours and hf, one .pth file for official.

    CheckpointError if the target holds something else, or the layout can not express the model.
    """
    target = Path(target)
    state = {plain_key(key): value.detach().cpu().contiguous() for key, value in state.items()}
    about = {"origin": "ours", **(about or {})}
    try:
        if layout == "official":
            write_file(target, official_file(state, config, about))
        else:
            contents = hf_files if layout == "hf" else our_files
            write_directory(target, contents(state, config, about))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{target}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{target}: can not be written: {error.strerror or error}") from error


def plain_key(key: str) -> str:
    """A parameter's name without what DDP, FSDP and torch.compile put into it."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def our_files(state: Mapping[str, Tensor], config: ModelConfig, about: Mapping[str, Any]) -> dict[str, bytes]:
    """Contents of a directory of ours."""
    return {
        "model.safetensors": safetensors.torch.save(dict(state), metadata={"format": "pt"}),
        "config.json": as_json(our_json(config, about)),
        "README.md": model_card(config, about, "ours").encode(),
    }


def hf_files(state: Mapping[str, Tensor], config: ModelConfig, about: Mapping[str, Any]) -> dict[str, bytes]:
    """Contents of a directory that `transformers.GroupViTModel.from_pretrained` loads.

    What that model has no parameter for goes into config.json. The image processor has ImageNet's mean
    and standard deviation, with which all GroupViT models were trained.
    """
    stored = from_ours(state, "hf")
    extra = {name: stored.pop(name).item() for name in HF_EXTRA if name in stored}
    dtype = str(state["image_encoder.patch_embedding.position"].dtype).removeprefix("torch.")
    size = config.image.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size * 8 / 7)},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    return {
        "config.json": as_json(hf_json(config, about, extra, dtype)),
        "model.safetensors": safetensors.torch.save(stored, metadata={"format": "pt"}),
        "preprocessor_config.json": as_json(processor),
        "README.md": model_card(config, about, "hf").encode(),
    }


def official_file(state: Mapping[str, Tensor], config: ModelConfig, about: Mapping[str, Any]) -> bytes:
    """An official .pth: the state dict under "model", and plain values only beside it."""
    refuse_unfaithful(config, "official")
    buffer = io.BytesIO()
    torch.save({"model": from_ours(state, "official"), FORMAT: our_json(config, about)}, buffer)
    return buffer.getvalue()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write one file under a hidden name, flush it to the disk, rename it."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name a file, such as {path / 'model.pth'}")
    write_bytes_atomically(path, data)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory under a hidden name and rename it; one that holds an older checkpoint is replaced.

    CheckpointError, with nothing changed, if there is anything in it that was not written here.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; name a directory to write to")
    foreign = sorted(item.name for item in path.iterdir() if item.name not in _FILES) if path.is_dir() else []
    if foreign:
        raise CheckpointError(f"{path}: holds other files ({foreign[0]}); name a new directory or clear it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        for name, data in files.items():
            write_file(temporary / name, data)
        temporary.chmod(0o755)
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was there goes away only after that, and comes back on failure."""
    if not path.is_dir() or not any(path.iterdir()):
        os.replace(new, path)
        return
    old = path.parent / f"{new.name}.old"
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)
