"""The contenders of `train_bench.py`: one whole training step of our model and of Hugging Face's."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupvit_fast.console import UserError
from groupvit_fast.data import text
from groupvit_fast.model.checkpoint_config import hf_json
from groupvit_fast.model.checkpoint_keys import from_ours
from groupvit_fast.model.groupvit import GroupViT, create_model
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.losses import contrastive_loss, multi_label_loss, text_labels
from groupvit_fast.training.optim import GuardedAdamW
from groupvit_fast.training.precision import DTYPES, autocast
from groupvit_fast.training.trainer import Trainer

_WORDS = (
    ("red", "old", "young", "wooden", "small", "happy", "vintage", "snowy", "modern", "white"),
    ("dog", "bridge", "woman", "table", "bicycle", "mountain", "cat", "player", "kitchen", "boat",
     "flower", "street", "tree", "horse", "car", "sofa", "lake", "house", "crowd", "plate"),
    ("standing near", "resting on", "seen from", "next to", "in front of", "moving towards"),
    ("", "", " at sunset", " in the city centre", " on a sunny day", " isolated on white background",
     ", stock photo", " during the annual festival"),
)  # fmt: skip


@dataclass
class Batch:
    images: Tensor
    texts: Tensor
    text_index: Tensor


def captions(count: int, seed: int = 0) -> list[str]:
    """Made-up captions about as long as those of CC3M (about 12 tokens)."""
    rng = random.Random(seed)
    adjective, noun, doing, ending = (partial(rng.choice, words) for words in _WORDS)
    return [f"a {adjective()} {noun()} {doing()} the {noun()}{ending()}" for _ in range(count)]


def make_batch(model: ModelConfig, size: int, prompts: int, device: str, seed: int = 0) -> Batch:
    rng = random.Random(seed)
    rows = [[caption, *text.draw_prompts(caption, prompts, rng)] for caption in captions(size, seed)]
    texts, index = text.unique_rows(rows, model.text.context_length)
    side = model.image.image_size
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return Batch(images.to(device), texts.to(device), index.to(device))


class Endless:
    """The trainer only wants to know how long an epoch is."""

    steps_per_epoch = 1000
    bad_samples = 0


class Ours:
    """`Trainer.train_step`, the very code of a run."""

    def __init__(self, model: GroupViT, config: TrainConfig, device: str, dtype: str) -> None:
        folder = Path(tempfile.gettempdir()) / "groupvit-train-bench"
        self.trainer = Trainer(model, Endless(), config, output=folder, device=device, dtype=dtype)

    def __call__(self, batch: Batch) -> None:
        self.trainer.train_step(batch)
        self.trainer.optimizer.zero_grad()  # a call leaves nothing behind: peak memory is that of a step


class HuggingFace:
    """`GroupViTModel` with the same weights, losses, optimiser and precision.

    Every text is padded to the context, as its tokenizer does. It has no loss over prompts and no drop
    path of its own, so the losses here are ours.
    """

    def __init__(self, model: GroupViT, config: TrainConfig, device: str, dtype: str) -> None:
        try:
            from transformers import GroupViTConfig, GroupViTModel
        except ImportError:
            raise UserError("the baseline needs transformers: pip install transformers") from None
        self.config, self.device, self.dtype = config, device, DTYPES[dtype]
        self.context = model.config.text.context_length
        try:
            settings = hf_json(model.config, {}, {}, "float32")
        except ValueError as error:
            raise UserError(f"the baseline is no such model: {error}") from None
        self.model = GroupViTModel(GroupViTConfig.from_dict(settings))
        state = from_ours(model.state_dict(), "hf")
        self.prompt_scale = nn.Parameter(state.pop("multi_label_logit_scale", torch.tensor(0.0)).clone())
        missing = self.model.load_state_dict(state, strict=False).missing_keys
        if [name for name in missing if "position_ids" not in name]:
            raise UserError(f"the baseline did not get all weights: {missing[0]} is missing")
        self.model.register_parameter("prompt_scale", self.prompt_scale)
        self.model.to(device).train()
        self.optimizer = GuardedAdamW(self.model, config, loss_scaling=dtype == "fp16")
        self.features: Callable[..., tuple[Tensor, Tensor]] = self._features
        if config.compile:
            self.features = torch.compile(self._features)

    def _features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image = self.model.get_image_features(images).pooler_output
        return image, self.model.get_text_features(tokens).pooler_output

    def loss(self, batch: Batch) -> Tensor:
        rows = batch.texts[batch.text_index.flatten()]
        tokens = nn.functional.pad(rows, (0, self.context - rows.shape[1]))
        with autocast(self.device, self.dtype):
            image, texts = self.features(batch.images, tokens)
        texts = texts.unflatten(0, batch.text_index.shape)
        loss = contrastive_loss(image, texts[:, 0], self.model.logit_scale)
        if texts.shape[1] > 1:
            labels = text_labels(batch.texts, batch.text_index)[:, 1:]
            loss = loss + multi_label_loss(image, texts[:, 1:], labels, self.prompt_scale)
        return loss

    def __call__(self, batch: Batch) -> None:
        self.optimizer.start_step()
        self.optimizer.step(self.loss(batch), 1e-4)
        self.optimizer.zero_grad()


def contenders(
    settings: ModelConfig, config: TrainConfig, device: str, dtype: str, *, compiled: bool
) -> dict[str, Callable[[Batch], None]]:
    """Both models with the same weights, eager and, if wanted, compiled."""
    made: dict[str, Callable[[Batch], None]] = {}
    for suffix, compile_it in (("", False), (" compiled", True))[: 1 + compiled]:
        chosen = replace(config, compile=compile_it)
        for name, kind in (("ours", Ours), ("hugging face", HuggingFace)):
            made[name + suffix] = kind(create_model(settings, seed=0), chosen, device, dtype)
    return made


@torch.no_grad()
def check(ours: Ours, theirs: HuggingFace, batch: Batch) -> None:
    """Both give the same loss, without noise and with the running statistics; UserError otherwise."""
    trainer = ours.trainer
    trainer.model.eval()
    theirs.model.eval()
    with autocast(trainer.device, DTYPES[trainer.dtype]):
        encoded = trainer.model(batch.images, batch.texts, batch.text_index)
    found, wanted = trainer.losses(encoded, batch)[0].item(), theirs.loss(batch).item()
    trainer.model.train()
    theirs.model.train()
    most = 1e-3 if trainer.dtype == "float32" else 0.05
    if not abs(found - wanted) < most * abs(wanted):
        raise UserError(f"the models do not compute the same loss: {found} and {wanted}")


def parts(ours: Ours, batch: Batch) -> dict[str, Callable[[], Any]]:
    """The pieces of our step, each to be timed alone; a backward piece includes its forward."""
    trainer = ours.trainer
    model, cast = trainer.model, lambda: autocast(trainer.device, DTYPES[trainer.dtype])

    def image(backward: bool) -> None:
        with cast(), torch.set_grad_enabled(backward):
            result = model.image_projector(
                model.image_encoder(batch.images, noise_key=trainer.noise_key).pooled
            )
        if backward:
            result.float().sum().backward()

    def texts(backward: bool) -> None:
        with cast(), torch.set_grad_enabled(backward):
            result = model.text_projector(model.text_encoder(batch.texts)[batch.text_index])
        if backward:
            result.float().sum().backward()

    with torch.no_grad(), cast():
        encoded = model(batch.images, batch.texts, batch.text_index)
    encoded = encoded._replace(
        image=encoded.image.float().requires_grad_(), text=encoded.text.float().requires_grad_()
    )
    gradients = [(parameter, torch.zeros_like(parameter)) for parameter in model.parameters()]
    zero = torch.zeros((), device=trainer.device)

    def update() -> None:
        trainer.optimizer.start_step()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        trainer.optimizer.update(zero, 0.0)

    return {
        "image forward": lambda: image(False),
        "image": lambda: image(True),
        "text forward": lambda: texts(False),
        "text": lambda: texts(True),
        "losses": lambda: trainer.losses(encoded, batch)[0].backward(),
        "optimiser": update,
    }
