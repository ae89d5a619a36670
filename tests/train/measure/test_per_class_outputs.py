"""Every classification has its scores class by class; one of images has thumbnails of its errors."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

import kitout
from kitout.evaluate.report import plots
from tiny_images import folder as pictures
from tiny_models import decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")


def run(model: Path, data: Path, out: Path, test: int = 12) -> tuple[dict, str, str]:  # type: ignore[type-arg]
    lines: list[str] = []
    kitout.train(
        model={"name": str(model), "dtype": "float32"}, data={"train": str(data), "test": test, "validation": 0},
        train={"steps": 2, "batch_size": 4}, output={"folder": str(out)}, log=lines.append,
    )  # fmt: skip
    return json.loads((out / "results.json").read_text()), (out / "report.html").read_text(), "\n".join(lines)


@pytest.mark.parametrize("kind", ["classes", "several labels", "tags", "closed answers"])
def test_every_classification_has_them(tmp_path: Path, kind: str) -> None:
    rows = {
        "classes": reviews(60),
        "several labels": [{"text": r["text"], "labels": ["all", r["label"]]} for r in reviews(60)],
        "tags": [{"tokens": r["text"].split(), "tags": ["W" if len(w) > 3 else "O" for w in r["text"].split()]}
                 for r in reviews(60)],
        "closed answers": [{"instruction": "good?", "input": r["text"], "output": r["label"]} for r in reviews(60)],
    }[kind]  # fmt: skip
    model = decoder(tmp_path / "m") if kind == "closed answers" else encoder(tmp_path / "m")
    results, page, text = run(model, jsonl(tmp_path / "d.jsonl", rows), tmp_path / "out")
    scores = {one["name"]: one for one in results["per_class"]["adapter"]}
    assert scores.keys() <= {"good", "bad", "all", "W"}
    assert scores
    if kind == "several labels":
        assert results["confusion"] == {}
    else:
        matrix = results["confusion"]["adapter"]
        assert set(matrix["names"]) <= {"good", "bad", "O", "W"}
        assert "Which class is taken for which" in page
        assert kind == "tags" or sum(map(sum, matrix["counts"])) == 12
        assert (tmp_path / "out" / "confusion.png").is_file() == plots.has_matplotlib()
    (row,) = results["adapters"]
    assert (row["trainable"], row["seconds"] > 0) == (results["trainable"]["adapter"], True)
    assert row["memory"] == 16 * row["trainable"]  # fp32: the values, their gradients, two moments
    for line in text[text.index("next:") :].splitlines()[1:]:
        assert line.strip().removeprefix("or in Python:") in html.unescape(page)
    for place in (page, text, (tmp_path / "out" / "adapter" / "README.md").read_text()):
        assert "lass by class" in place
    if kind == "classes":
        true, predicted = (results[key]["adapter"] for key in ("true", "predicted"))
        for label, name in enumerate(results["labels"].get("adapter", ["bad", "good"])):
            hits = sum(a == b == label for a, b in zip(true, predicted, strict=True))
            assert scores[name]["recall"] == hits / true.count(label)


def test_images_have_thumbnails_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    results, page, text = run(vision(tmp_path / "m"), pictures(tmp_path / "d", each=12), tmp_path / "out")
    wrong = sum(a != b for a, b in zip(results["true"]["adapter"], results["predicted"]["adapter"], strict=True))
    assert wrong
    assert page.count('src="data:image/jpeg;base64,') == min(wrong, 24) + 12  # and the first ones, right or wrong
    assert "Misclassified images" in page
    assert "<svg" in page
    assert "tokens_per_second" not in results
    assert results["images"] == 8
    assert results["images_per_second"] > 0
    assert "images per second" in text
    shown = text + capsys.readouterr().out
    assert "tokens" not in shown
    assert "images 8 at " in shown
    assert "tokens per second" not in page
