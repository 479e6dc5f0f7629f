"""What a training run can be told.

`TrainConfig` is the only list of training options: the command line, YAML files and `--help` are made
from its fields.
"""

# ruff: noqa: RUF009 (`option` is `dataclasses.field` with two arguments filled in)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupvit_fast.console import UserError


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, metavar: str = "") -> Any:
    """A field of `TrainConfig` that documents itself."""
    metadata = {"help": help, "choices": choices, "metavar": metavar}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=type(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a training run; `GROUPS` says under which heading `--help` shows each."""

    preset: str = option("tiny", "recipe to start from", metavar="NAME")
    model: dict = option({}, "change the model, for example image.tau=0.5 (repeatable)", metavar="KEY=VALUE")

    data: list[str] = option(
        [],
        "webdataset shards: paths, folders, brace patterns, http(s):// or s3:// URLs, pipe:COMMANDs",
        metavar="SHARDS",
    )
    data_weights: list[float] = option(
        [], "how often an epoch shows each sample, one number for each --data (default: once)", metavar="X"
    )
    allow_missing: bool = option(False, "go on without shards that do not exist")
    shard_cache: Path | None = option(None, "folder that remote shards are downloaded into", metavar="DIR")
    shard_cache_gb: float | None = option(None, "most gigabytes of shards to keep there (default: no limit)")
    data_root: Path | None = option(
        None, "where the built-in shapes dataset is kept (default: user cache)", metavar="DIR"
    )
    shapes_train: int = option(12_000, "scenes to draw for training when no --data is given")
    shapes_val: int = option(200, "held-out scenes with exact masks")
    shapes_seed: int = option(0, "seed of the drawn scenes, apart from --seed")
    min_crop: float = option(0.08, "smallest share of an image's area that a training crop keeps")
    flip: bool = option(True, "mirror half of the training images")
    aa: str | None = option(
        None, "RandAugment by timm's name, for example rand-m9-mstd0.5-inc1", metavar="POLICY"
    )
    color_jitter: float = option(0.0, "strength of colour jitter; as in timm, unused where --aa is given")
    reprob: float = option(0.0, "probability that a rectangle of an image is replaced by noise")
    prompt_templates: str = option("clip", "sentences around the nouns of prompts", choices=("clip", "noun"))
    noun_tags: str = option(
        "official",
        "words that count as nouns; official: verbs too; nltk: NLTK finds them, not textblob",
        choices=("official", "nouns", "phrases", "nltk:official", "nltk:nouns", "nltk:phrases"),
    )
    prompt_fill: str = option(
        "caption", "what fills the prompts of a caption with few nouns", choices=("caption", "noun")
    )
    workers: int | None = option(None, "data threads (default: by the number of cores)")

    steps: int | None = option(None, "optimiser steps")
    epochs: float | None = option(None, "passes over the data, instead of --steps")
    train_samples: int | None = option(None, "image-caption pairs to train on, instead of --steps")
    accum_freq: int = option(
        1, "batches a step: the losses compare all of them, in the memory of one and a second forward pass"
    )
    batch_size: int = option(256, "image-caption pairs a batch and process")

    optimizer: str = option(
        "adamw",
        "adamw: PyTorch's fused one; the others need NVIDIA apex",
        choices=("adamw", "apex-adam", "apex-lamb"),
    )
    lr: float = option(1.6e-3, "peak learning rate at a global batch of --lr-batch pairs")
    lr_batch: int | None = option(None, "global batch that the rates are stated for; none: used as they are")
    min_lr: float = option(4e-5, "learning rate at the end of the cosine")
    warmup_lr: float = option(4e-6, "learning rate of the first step")
    warmup_steps: int | None = option(None, "steps of linear warm-up")
    warmup_epochs: float = option(0.0, "the same in passes over the data, if --warmup-steps is not given")
    weight_decay: float = option(0.05, "decay of all parameters but biases and 1-D ones")
    beta1: float = option(0.9, "AdamW's first moment")
    beta2: float = option(0.999, "AdamW's second moment")
    eps: float = option(1e-8, "AdamW's epsilon")
    clip_grad: float = option(5.0, "largest gradient norm; 0 switches clipping off")
    layer_decay: float = option(1.0, "rate of a layer over that of the layer above it; 1: all alike")
    freeze: list[str] = option(
        [], "leave parameters as they are whose names begin so, for example text_encoder (repeatable)",
        metavar="NAME",
    )  # fmt: skip
    model_ema: bool = option(False, "keep a moving average of the weights, evaluated and saved too (ema/)")
    model_ema_decay: float = option(0.9998, "decay of that average; smaller in the first steps")

    multi_label: int = option(0, "single-noun prompts an image for the multi-label loss; 0: none")
    contrastive_weight: float = option(1.0, "weight of the image-caption loss")
    multi_label_weight: float = option(1.0, "weight of the multi-label loss")
    multi_label_match: str = option(
        "image",
        "what a prompt is compared with: the mean of an image's groups (the paper), or its best group",
        choices=("image", "group"),
    )
    merge_captions: bool = option(False, "treat equal captions in a batch as one label")
    siglip: bool = option(False, "SigLIP's sigmoid loss in place of the softmax of both losses")
    local_loss: bool = option(
        True, "compare a process's own rows with everybody's; no: everybody's with everybody's, same loss"
    )
    gather_with_grad: bool = option(
        True, "gradients flow between processes; no: an approximation, as open_clip's default"
    )
    gumbel: bool = option(True, "Gumbel noise on the group assignment while training")

    amp: bool = option(False, "mixed precision; weights, norms, softmax and losses stay float32")
    amp_dtype: str = option(
        "auto",
        "type of --amp; auto: bf16, but float32 on a CPU where bf16 is not faster",
        choices=("auto", "bf16", "fp16", "float32"),
    )
    compile: bool = option(False, "compile the model with torch.compile (needs a C++ compiler at run time)")
    fsdp: bool = option(
        False, "several processes: shard weights, gradients and moments over them (FSDP2) instead of copying"
    )
    cuda_graphs: bool = option(False, "record the image encoder's kernels once and replay them (GPU only)")
    grad_checkpointing: list[str] = option(
        [],
        "save memory: compute layers again in the backward pass; all, text, image or a stage's number "
        "(repeatable)",
        metavar="PART",
    )
    deterministic: bool = option(True, "on a GPU: kernels that give the same bits every time")
    max_bad_steps: int = option(
        10,
        "after so many steps in a row with a non-finite loss or gradient: back to the last good checkpoint",
    )
    max_rewinds: int = option(3, "how often that is tried, with other data each time, before training stops")
    timeout_seconds: float = option(
        600.0, "end all processes when one is silent or stands still for so long, and name it; 0: never"
    )

    eval_data: list[str] = option(
        [],
        "folder of labelled held-out images, as DIR or DATASET=DIR (repeatable; the first one counts; "
        "default: those of shapes, else no evaluation)",
        metavar="DIR",
    )
    eval_dataset: str = option(
        "voc-folder", "layout and classes of an --eval-data without DATASET, as of groupvit_fast.evaluate"
    )
    eval_protocol: str | None = option(
        None, "evaluation protocol (default: shapes for models below 128 px, else official)"
    )
    eval_background_threshold: float | None = option(None, "score below which a pixel is background")
    eval_every: int | None = option(None, "evaluate every so many steps, besides before and after")
    save_every: int = option(500, "steps between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints to keep")
    save_every_minutes: float | None = option(None, "also save at the first log point after so many minutes")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    report_to: str = option("none", "also log to: tensorboard, wandb or both with a comma", metavar="NAMES")
    profile_steps: str | None = option(
        None, "profile steps FIRST to END - 1 into the run folder's profile/", metavar="FIRST:END"
    )

    dry_run: bool = option(False, "print what the run would need on --world-size processes, and stop")
    world_size: int | None = option(None, "processes that --dry-run plans for (default: 1)")
    measured: Path | None = option(
        None, "result of train_bench.py, from which --dry-run takes the speed of one device", metavar="FILE"
    )
    output: Path | None = option(None, "run folder (default: runs/<preset>-<date-time>)", metavar="DIR")
    resume: str | None = option(
        None,
        "continue: auto (newest checkpoint in --output, if any), a run or a step folder",
        metavar="auto|DIR",
    )
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of weights, data order, crops, prompts and noise")
    seed_sweep: int | None = option(
        None, "run so many seeds, from --seed on, into OUTPUT/seed_K and report mean and spread"
    )
    json: Path | None = option(None, "also write the result as JSON to FILE", metavar="FILE")
    quiet: bool = option(False, "print only errors and the final result")

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            _require(getattr(self, name) >= 1, self, name, "1 or more")
        for name in POSITIVE_OR_NONE:
            _require(getattr(self, name) is None or getattr(self, name) > 0, self, name, "more than 0")
        for name in NOT_NEGATIVE:
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        _require(self.lr > 0, self, "lr", "more than 0")
        _require(0 < self.layer_decay <= 1, self, "layer_decay", "in (0, 1]")
        _require(0 <= self.model_ema_decay < 1, self, "model_ema_decay", "in [0, 1)")
        _require(0 < self.min_crop <= 1, self, "min_crop", "in (0, 1]")
        _require(0 <= self.reprob <= 1, self, "reprob", "in [0, 1]")
        _require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")
        _require(0 <= self.beta2 < 1, self, "beta2", "in [0, 1)")


AT_LEAST_ONE = (
    "batch_size", "accum_freq", "save_every", "keep_checkpoints", "log_every", "max_bad_steps",
    "shapes_train", "shapes_val",
)  # fmt: skip
POSITIVE_OR_NONE = (
    "steps", "epochs", "train_samples", "world_size", "eval_every", "save_every_minutes", "workers",
    "lr_batch", "shard_cache_gb", "seed_sweep",
)  # fmt: skip
NOT_NEGATIVE = (
    "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "clip_grad", "multi_label",
    "contrastive_weight", "multi_label_weight", "max_rewinds", "color_jitter", "timeout_seconds",
    "seed",
)  # fmt: skip

GROUPS: dict[str, tuple[str, str]] = {
    "what is trained": ("preset", "model"),
    "data": ("data", "workers"),
    "length": ("steps", "batch_size"),
    "optimiser": ("optimizer", "model_ema_decay"),
    "losses": ("multi_label", "gumbel"),
    "precision and safety": ("amp", "timeout_seconds"),
    "evaluation, checkpoints, metrics": ("eval_data", "profile_steps"),
    "run": ("dry_run", "quiet"),
}
"""Heading -> first and last field shown under it."""


def _require(holds: bool, config: TrainConfig, name: str, wanted: str) -> None:
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} is {getattr(config, name)}, but it must be {wanted}")
