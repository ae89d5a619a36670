"""What the vision demo shows and leaves behind: the table, the closing words, and three pictures.

It prints and draws figures it is given and computes none but the confusion counts. It knows no model and no method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kitout.data.images.image_set import Images
from kitout.demo import vision_pictures
from kitout.demo.screen import Screen

OWN = "the model's own"  # what a row that brings no head says of it


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The most accurate method; of equals the one with the fewest trained values."""
    return max(rows, key=lambda r: (r["accuracy"], -r["trainable"]))


def pictures(out: Path, results: dict[str, Any], test: Images) -> list[Path]:
    """compare.png, confusion.png and errors.png of the best method; none without matplotlib."""
    if not vision_pictures.possible():
        return []
    top, names, truth = best(results["rows"]), results["names"], results["truth"]
    return [
        vision_pictures.compare(out / "compare.png", results["rows"], results["majority"], _heading(results)),
        vision_pictures.confusion(out / "confusion.png", top, truth, names),
        vision_pictures.errors(out / "errors.png", top, truth, names, test),
    ]


def _heading(results: dict[str, Any]) -> str:
    model, data = results["model"], results["data"]
    return (
        f"{model.get('name', Path(model['folder']).name)} on {Path(data['path']).name}: {data['train']:,} training "
        f"images, {results['settings']['budget']:,} shown to each method"
    )


def show(screen: Screen, results: dict[str, Any], out: Path, drawn: list[Path]) -> None:
    header = ["method", "trained", "%", "accuracy, 95 % interval", "train s", "s/image"]
    lines = [_line(row) for row in results["rows"]]
    lines.append(["commonest class", "0", "0", f"{100 * results['majority']:.1f}", "", ""])
    screen.say()
    screen.table(f"{_heading(results)}; {results['data']['test']:,} test images", header, lines)
    for words in _closing(results, out, drawn):
        screen.say(words)


def _line(row: dict[str, Any]) -> list[str]:
    low, high = row["interval95"]
    done = row["training"]
    return [
        row["title"],
        f"{row['trainable']:,}",
        f"{row['percent']:.2f}" if row["percent"] < 99.995 else "100",
        f"{100 * row['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})",
        f"{done['seconds']:.0f}",
        f"{done['seconds'] / max(1, done['images']):.3f}",
    ]


def _closing(results: dict[str, Any], out: Path, drawn: list[Path]) -> list[str]:
    rows, model = results["rows"], results["model"]
    top = best(rows)
    near = [r["title"] for r in rows if r is not top and r["interval95"][1] >= top["interval95"][0]]
    verdict = f"best: {top['title']}"
    if near:
        verdict += f"; its interval meets that of {', '.join(near)}: {top['images']:,} images do not part these"
    lines = [verdict]
    resumed = [r["title"] for r in rows if r["training"]["resumed_at"]]
    if resumed:
        lines.append(f"resumed from a checkpoint, so their seconds add up over runs: {', '.join(resumed)}")
    if "caveat" in model:
        lines.append(f"note: {model['name']}: {model['caveat']}")
    adapter = out / top["key"] / "adapter"
    return [
        *lines,
        "",
        f"figures: {out / 'results.json'}" + "".join(f", {file.name}" for file in drawn),
        f"adapters: {out}/METHOD/adapter; the best one: {adapter} ({top['bytes'] / 2**20:.1f} MiB)",
        f"to start over, remove {out}; on your own images:",
        "  kitout demo vision --data FOLDER_OF_CLASS_FOLDERS --model MODEL_FOLDER   (or a table of paths and labels)",
        "wear it in Python:",
        *(f"  {line}" for line in wearing(top, adapter, results)),
    ]


def wearing(row: dict[str, Any], adapter: Path, results: dict[str, Any]) -> list[str]:
    """Lines that load an adapter of this run onto a fresh model."""
    classes = len(results["names"])
    lines = ["import kitout; from transformers import AutoModelForImageClassification"]
    heads = ""
    if row["head"] == "batchnorm":
        lines.append("from kitout.train.setup.heads import batchnorm")
        heads = f", heads=batchnorm(kit, {classes})"
    if row["head"] == OWN:  # kept as a difference from the model's own fresh head, which this seed gives again
        lines.append(f"import torch; torch.manual_seed({results['settings']['seed']})")
    return [
        *lines,
        "model = AutoModelForImageClassification.from_pretrained(",
        f"    {results['model']['folder']!r}, num_labels={classes}, ignore_mismatched_sizes=True)",
        "kit = kitout.attach(model.eval())",
        f"kit.load({str(adapter)!r}, name='best'{heads}); kit.use('best')",
    ]
