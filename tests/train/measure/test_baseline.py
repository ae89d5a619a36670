"""An adapter with a newly initialized head is compared with the best constant answer, never with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import kitout
from kitout.train.measure import evaluate
from tiny_images import folder as pictures
from tiny_models import encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")

UNEVEN = [row for i, row in enumerate(reviews(120)) if row["label"] == "good" or i % 6 == 1]
TABLES: dict[str, list[dict[str, Any]]] = {
    "classification": UNEVEN,
    "regression": [{"text": r["text"], "label": len(r["text"]) + 0.5} for r in UNEVEN],
    "multilabel": [{"text": r["text"], "labels": ["all", r["label"]]} for r in UNEVEN],
    "token_classification": [{"tokens": r["text"].split(), "tags": ["O"] * len(r["text"].split()[1:]) + ["PER"]}
                             for r in UNEVEN],
}  # fmt: skip


def train(model: Path, data: Any, out: Path, steps: int = 1, **more: Any) -> tuple[Any, str]:
    settings = {
        "model": {"name": str(model), "dtype": "float32"}, "data": {"train": str(data), "test": 0.3, "validation": 0},
        "train": {"steps": steps, "batch_size": 4, "lr": 1e-6, "head_lr": 1e-6}, "output": {"folder": str(out)},
    }  # fmt: skip
    lines: list[str] = []
    return kitout.train(settings | more, log=lines.append), "\n".join(lines)


@pytest.mark.parametrize("objective", [*TABLES, "image_classification"])
def test_an_untrained_head_is_never_asked(tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    own = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: asked.append(a[3]) or own(*a, **k))
    is_image = objective == "image_classification"
    model = vision(tmp_path / "m") if is_image else encoder(tmp_path / "m")
    data = pictures(tmp_path / "d") if is_image else jsonl(tmp_path / "d.jsonl", TABLES[objective])
    result, text = train(model, data, tmp_path / "out")
    assert asked == ["adapter"]
    first, *_ = changes = result.comparisons["adapter"].changes
    assert first.baseline != "base"
    assert {"loss"} <= {change.name for change in changes}
    assert not first.is_better  # one step of a rate of 1e-6 teaches nothing: today's base of random weights says so too
    assert f"the {first.baseline}" in text
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert f"## Results: {first.baseline} vs. fine-tuned" in card
    assert f'<th class="n">{first.baseline}</th>' in (tmp_path / "out" / "report.html").read_text()
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {change["baseline"] for change in figures["comparisons"]["adapter"]} == {first.baseline}
    if objective in ("classification", "image_classification"):
        assert first.base.value == figures["majority"]["adapter"]


def test_it_is_beaten_where_the_interval_excludes_it(tmp_path: Path) -> None:
    learning = {"train": {"steps": 12, "batch_size": 8, "lr": 5e-3}}
    result, text = train(vision(tmp_path / "m"), pictures(tmp_path / "d", each=20), tmp_path / "out", **learning)
    first = result.comparisons["adapter"].changes[0]
    assert first.is_better
    assert first.low > 0
    assert "better than the majority class by" in text
    comparison = result.comparisons["adapter"]
    assert comparison.probe is not None  # colors are easy: a linear probe of frozen features finds them too
    assert comparison.is_better == (True if comparison.probe.is_better else None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert ('verdict good"' in page) == (comparison.is_better is True)
    assert "linear probe" in page
    assert "linear probe" in text


def test_a_head_of_the_checkpoint_is_the_base(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "m")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    whole.save_pretrained(folder)
    data = jsonl(tmp_path / "d.jsonl", UNEVEN)
    result, _ = train(folder, data, tmp_path / "out")
    assert result.comparisons["adapter"].baseline == "base"
