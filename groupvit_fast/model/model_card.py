"""The README.md that lies beside converted and saved weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from groupvit_fast.model.presets import PRESETS, ModelConfig

# What the authors say of the two checkpoints they released.
_RELEASED = {
    "groupvit-gcc-yfcc": {
        "data": "CC3M (2,891,445 pairs), CC12M (11,156,203) and YFCC (14,615,499)",
        "recipe": "30 epochs, caption contrast and multi-label contrast with 3 prompts an image",
        "miou": (52.3, 22.4, 24.3),
    },
    "groupvit-gcc-redcaps": {
        "data": "CC3M (2,891,445 pairs), CC12M (11,156,203) and RedCaps (11,866,987)",
        "recipe": "30 epochs, caption contrast alone",
        "miou": (50.8, 23.7, 27.5),
    },
}
_DATASETS = ("Pascal VOC 2012", "Pascal Context", "COCO-Object")

_FOREIGN_LICENCE = """\
These weights were converted from a checkpoint that groupvit_fast did not train. The weights which the
GroupViT authors released are for **non-commercial use only** (NVIDIA Source Code License for GroupViT). If
these are those weights or were fine-tuned from them, the same terms hold for them, and this note must stay
with every copy. The licence of the groupvit_fast code does not change that."""

_OWN_LICENCE = """\
These weights were trained with groupvit_fast and carry the licence that whoever trained them gives them.
Check the terms of the training images and captions before you publish or sell anything made with them.
If the training started from weights that the GroupViT authors released, their **non-commercial** terms
hold here too."""


def model_card(config: ModelConfig, about: Mapping[str, Any], layout: str) -> str:
    """Markdown with data, recipe, protocol table and licence notes.

    `about` (from config.json) may hold origin, data, recipe and results; what it lacks is said to be
    unknown. `layout` is the layout of the directory that the card is for.
    """
    foreign = about.get("origin", "ours") != "ours"
    released = _RELEASED.get(matching_preset(config) or "", {}) if foreign else {}
    data = about.get("data") or (
        f"If these are the released weights: {released['data']}." if released else ""
    )
    recipe = about.get("recipe") or (
        f"If these are the released weights: {released['recipe']}." if released else ""
    )
    image, text = config.image, config.text
    sections = [
        "---\nlicense: other\nlibrary_name: "
        + ("transformers" if layout == "hf" else "groupvit_fast")
        + "\ntags:\n- groupvit\n- zero-shot-segmentation\n---",
        "# GroupViT",
        "Zero-shot semantic segmentation learnt from image-caption pairs "
        "(Xu et al., CVPR 2022, arXiv:2202.11094).\n\n"
        f"- image encoder: {image.image_size} px, patch {image.patch_size}, width {image.width}, layers "
        f"{'/'.join(map(str, image.depths))}, group tokens {'/'.join(map(str, image.group_tokens))}, groups "
        f"{'/'.join(map(str, image.output_groups))}\n"
        f"- text encoder: width {text.width}, {text.layers} layers, {text.context_length} tokens of "
        f"{text.vocab_size}\n- shared space: {config.embed_dim}\n"
        "- pixels: ImageNet mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225)",
        f"## Data\n\n{as_text(data) or 'Not recorded.'}",
        f"## Recipe\n\n{as_text(recipe) or 'Not recorded.'}",
        f"## Results\n\n{results_table(about.get('results') or {}, released)}",
        f"## Licence\n\n{_FOREIGN_LICENCE if foreign else _OWN_LICENCE}",
        f"## Use\n\n```python\n{_use(layout)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def matching_preset(config: ModelConfig) -> str | None:
    """The preset with this architecture, or None; what only training uses is not compared."""
    for name, build in PRESETS.items():
        wanted = build()
        image = replace(config.image, drop_path=wanted.image.drop_path)
        if replace(config, image=image, logit_scale_init=wanted.logit_scale_init) == wanted:
            return name
    return None


def results_table(results: Mapping[str, Any], released: Mapping[str, Any]) -> str:
    """mIoU by protocol: what was measured, and what the authors published for the released weights."""
    rows = []
    if "miou" in results:
        where = results.get("dataset", "held-out split of the run")
        rows.append(
            f"| {results.get('protocol', 'of the run')} | {where} | {100 * results['miou']:.1f} | measured |"
        )
    for dataset, miou in zip(_DATASETS, released.get("miou", ()), strict=False):
        rows.append(
            f"| official | {dataset} | {miou} | published for the released weights, not measured here |"
        )
    if not rows:
        return "Not recorded."
    return "\n".join(["| protocol | dataset | mIoU | source |", "|---|---|---|---|", *rows])


def as_text(value: Any) -> str:
    """Text as it is, anything else as a JSON block."""
    if isinstance(value, str) or not value:
        return value or ""
    return f"```json\n{json.dumps(value, indent=2)}\n```"


def _use(layout: str) -> str:
    if layout == "hf":
        return (
            "from transformers import AutoImageProcessor, GroupViTModel\n\n"
            'model = GroupViTModel.from_pretrained("this directory")\n'
            'processor = AutoImageProcessor.from_pretrained("this directory")'
        )
    return 'import groupvit_fast\n\nmodel = groupvit_fast.load_model("this directory").eval()'
