"""report.html: one self-contained page of what a run did, made from the files in its folder alone."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from groupvit_fast.console import UserError, write_text_atomically
from groupvit_fast.training.curves import Line, chart, short

TEMPLATE = Path(__file__).with_name("report.html")
MOST_PICTURES = 8
SHOWN_WIDTH = 1400


def write(run: Path) -> Path:
    """Make RUN/report.html and return its path; UserError if the folder holds no run."""
    records, evaluations = _records(run), _evaluations(run)
    if not records and not evaluations:
        raise UserError(f"{run} holds no run to report on: neither metrics.jsonl nor evaluations.json")
    result = _json(run / "result.json")
    settings = run / "config.yaml"
    options = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    parts = [
        _facts(records, evaluations, result),
        _section("Curves", _charts(records, evaluations), "charts"),
        _pictures(run),
        _table(evaluations),
        f'<h2>Configuration</h2><details class="card"><summary>config.yaml</summary><pre>'
        f"{html.escape(options)}</pre></details>" if options else "",
    ]  # fmt: skip
    preset = re.search(r"^preset: (\S+)", options, flags=re.MULTILINE)
    steps = records[-1]["step"] if records else max(evaluations)
    fill = {
        "title": html.escape(f"{preset[1] if preset else 'GroupViT'}: {run.resolve().name}"),
        "subtitle": html.escape(f"groupvit_fast training run, {steps} steps"),
        "body": "\n".join(parts),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: fill[name[1]], page)
    path = run / "report.html"
    write_text_atomically(path, page)
    return path


def _records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a crash cut off is passed over."""
    path, records = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _evaluations(run: Path) -> dict[int, dict[str, Any]]:
    found = {int(step): result for step, result in _json(run / "evaluations.json").items()}
    return dict(sorted(found.items()))


def _section(title: str, content: str, kind: str) -> str:
    return f'<h2>{title}</h2><div class="{kind}">{content}</div>' if content else ""


def _facts(
    records: list[dict[str, Any]], evaluations: dict[int, dict[str, Any]], result: dict[str, Any]
) -> str:
    """The few numbers that matter most, as tiles."""
    tiles = []
    if evaluations:
        first, last = next(iter(evaluations)), list(evaluations)[-1]
        before = f"{evaluations[first]['miou']:.3f} before" if first == 0 and last else f"at step {last}"
        tiles.append(("zero-shot mIoU", f"{evaluations[last]['miou']:.3f}", before))
        if "ema" in evaluations[last]:
            tiles.append(("EMA mIoU", f"{evaluations[last]['ema']['miou']:.3f}", "averaged weights"))
        best = result.get("best")
        if best and best["step"] != last:
            tiles.append(("best mIoU", f"{best['miou']:.3f}", f"at step {best['step']}"))
    if records:
        last = records[-1]
        loss = "-" if last["loss"] is None else f"{last['loss']:.3f}"
        tiles.append(("loss", loss, f"at step {last['step']}"))
        rates = sorted(record["images_per_s"] for record in records)
        tiles.append(("pairs a second", short(round(rates[len(rates) // 2], 1)), "median"))
        if last.get("groups_in_use") is not None:
            share = f"largest has {100 * last['largest_group']:.0f} %" if last.get("largest_group") else ""
            tiles.append(("groups in use", f"{last['groups_in_use']:.1f}", share))
        bad = f"{last.get('rewinds', 0)} rewinds, {last.get('bad_samples', 0)} bad samples"
        tiles.append(("steps skipped", str(last["bad_steps"]), bad))
    seconds = result.get("training", {}).get("seconds")
    if seconds:
        tiles.append(("time", f"{seconds / 60:.1f} min", "all in all"))
    cells = "".join(
        f'<div class="card"><dt>{name}</dt><dd>{value}<small>{html.escape(note)}</small></dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="facts">{cells}</dl>'


def _charts(records: list[dict[str, Any]], evaluations: dict[int, dict[str, Any]]) -> str:
    def line(key: str, name: str, factor: float = 1.0) -> Line:
        values = [(record["step"], record.get(key)) for record in records]
        return Line(name, [(x, y if y is None else y * factor) for x, y in values])

    others = sorted({name for result in evaluations.values() for name in result.get("others", {})})
    scores = [
        ("mIoU", [(step, result["miou"]) for step, result in evaluations.items()]),
        ("averaged weights", [(s, r["ema"]["miou"]) for s, r in evaluations.items() if "ema" in r]),
        *((n, [(s, r["others"][n]["miou"]) for s, r in evaluations.items()]) for n in others[:2]),
    ]
    losses = [line("loss", "total"), line("contrastive", "contrastive"), line("multi_label", "multi-label")]
    if all(not record.get("multi_label") for record in records):
        losses = losses[:1]
    return "".join(
        [
            chart("Zero-shot mIoU", [Line(name, points, True) for name, points in scores], zero=True),
            chart("Loss", losses),
            chart("Groups in use", [line("groups_in_use", "mean of an image")], zero=True),
            chart(
                "How evenly groups share an image",
                [line("group_entropy", "entropy (1: alike)"), line("largest_group", "largest group's area")],
                zero=True,
            ),
            chart("Gradient norm", [line("grad_norm", "before clipping")], zero=True),
            chart(
                "Temperature",
                [line("logit_scale", "contrastive"), line("multi_label_logit_scale", "multi-label")],
            ),
            chart("Learning rate", [line("lr", "rate")], zero=True),
            chart("Pairs a second", [line("images_per_s", "all processes")], zero=True),
            chart("Waiting for data", [line("data_wait", "% of the time", 100)], zero=True, unit=" %"),
            chart("Arithmetic used (MFU)", [line("mfu", "% of what is possible", 100)], zero=True, unit=" %"),
            chart("Memory of a process", [line("memory_gb", "GB")], zero=True, unit=" GB"),
            chart("Steps skipped so far", [line("bad_steps", "not finite")], zero=True),
        ]
    )  # fmt: skip


def _pictures(run: Path) -> str:
    """The pictures of the evaluations behind a slider, at most `MOST_PICTURES`, first and last among them."""
    paths = sorted((run / "pictures").glob("step_*.png"))
    if len(paths) > MOST_PICTURES:
        places = [round(number * (len(paths) - 1) / (MOST_PICTURES - 1)) for number in range(MOST_PICTURES)]
        paths = [paths[place] for place in places]
    if not paths:
        return ""
    hidden = [" hidden"] * (len(paths) - 1) + [""]
    images = "".join(
        f'<img src="{_embedded(path)}" alt="step {int(path.stem[5:])}"{state}>'
        for path, state in zip(paths, hidden, strict=True)
    )
    last = len(paths) - 1
    slider = f'<input type="range" data-pictures min="0" max="{last}" value="{last}" aria-label="evaluation">'
    shown = f"<output>step {int(paths[-1].stem[5:])}</output>"
    return (
        '<h2>Groups of some held-out images</h2><figure class="card picture"><figcaption>'
        f"{slider if last else ''}{shown}</figcaption>{images}</figure>"
    )


def _embedded(path: Path) -> str:
    """A picture as a data URL, no wider than it is shown."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width > SHOWN_WIDTH:
        picture = picture.resize((SHOWN_WIDTH, round(picture.height * SHOWN_WIDTH / picture.width)))
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(evaluations: dict[int, dict[str, Any]]) -> str:
    """IoU of each class at the last evaluation, and before training where that was measured."""
    if not evaluations:
        return ""
    last = list(evaluations)[-1]
    before = evaluations.get(0) if last else None
    old = {row["name"]: row["iou"] for row in before["per_class"]} if before else {}
    rows = []
    result = evaluations[last]
    for row in [*result.get("per_class", []), {"name": "mean", "iou": result["miou"]}]:
        iou = row["iou"]
        earlier = before["miou"] if before and row["name"] == "mean" else old.get(row["name"])
        cells = [html.escape(row["name"]), _score(iou), *([_score(earlier)] if before else [])]
        cells.append("" if row.get("share") is None else f"{100 * row['share']:.1f} %")
        bar = f'<td class="bar"><i style="width:{100 * (iou or 0):.1f}%"></i></td>'
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + bar + "</tr>")
    heads = ["class", "IoU", *(["before"] if before else []), "share of pixels", ""]
    head = "".join(f"<th>{name}</th>" for name in heads)
    name = html.escape(str(result.get("dataset", "")))
    return (
        f"<h2>Evaluation on {name} at step {last}</h2>"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
