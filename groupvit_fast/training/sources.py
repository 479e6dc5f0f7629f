"""Where the training pairs come from: the shards that were named, or the built-in shapes dataset."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from groupvit_fast.console import UserError
from groupvit_fast.data import shapes
from groupvit_fast.data.augment import Augmentation, RandAugment
from groupvit_fast.data.pipeline import TrainLoader
from groupvit_fast.data.remote import ShardCache, is_remote
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World, barrier


def open_loader(
    config: TrainConfig,
    model: ModelConfig,
    shards: list[str],
    world: World,
    device: str,
    output: Path | None = None,
) -> TrainLoader:
    """The loader of one process of a run; samples that turn out broken are listed in the folder `output`."""
    limit = None if config.shard_cache_gb is None else int(config.shard_cache_gb * 1e9)
    return TrainLoader(
        shards,
        batch_size=config.batch_size,
        image_size=model.image.image_size,
        num_prompts=config.multi_label,
        context_length=model.text.context_length,
        prompt_templates=config.prompt_templates,
        noun_tags=config.noun_tags,
        prompt_fill=config.prompt_fill,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        device=device,
        num_threads=config.workers,
        min_crop=config.min_crop,
        flip=config.flip,
        augment=augmentation(config),
        weights=config.data_weights or None,
        allow_missing=config.allow_missing,
        shard_cache=ShardCache(config.shard_cache, limit) if config.shard_cache else None,
        quarantine_file=output / "quarantine.txt" if output else None,
        quiet=config.quiet or not world.is_main,
    )


def absolute(spec: str) -> str:
    """A `--data` that names the same shards from any folder."""
    return "::".join(part if is_remote(part) else os.path.abspath(part) for part in spec.split("::"))


def augmentation(config: TrainConfig) -> Augmentation:
    """What the options say is done to the training crops."""
    rand = RandAugment.parse(config.aa) if config.aa else None
    return Augmentation(rand, config.color_jitter, config.reprob)


def shapes_folder(config: TrainConfig, world: World) -> Path:
    """The built-in dataset with `train/*.tar` and `voc/`, drawn now unless it is there already.

    One process of each machine draws; the others wait. Its name holds what it depends on - the options and
    the drawing code - so a folder is never stale, and it appears only when it is complete.
    """
    root = config.data_root or _cache_root()
    sources = sorted(Path(shapes.__file__).parent.glob("shapes*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    name = f"shapes-{config.shapes_train}-{config.shapes_val}-seed{config.shapes_seed}-{code}"
    if world.local_rank == 0 and not (root / name).is_dir():
        if not config.quiet:
            print(f"drawing the shapes dataset into {root / name}", file=sys.stderr)
        _draw(config, root, root / name)
    barrier()
    return root / name


def _draw(config: TrainConfig, root: Path, final: Path) -> None:
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".drawing-", dir=root)
        shapes.write_shapes(
            Path(temporary),
            train_samples=config.shapes_train,
            val_samples=config.shapes_val,
            seed=config.shapes_seed,
        )
        os.chmod(temporary, 0o755)  # mkdtemp makes folders for one user only
        os.rename(temporary, final)
    except OSError as error:
        # another run may have finished the same folder meanwhile, which serves as well
        if not final.is_dir():
            raise UserError(
                f"cannot write the shapes dataset to {root}: {error.strerror or error}; "
                "name a writable folder with --data-root"
            ) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groupvit_fast"
