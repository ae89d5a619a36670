"""The whole vision demo on a tiny model and tiny images, through the command line a user types."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from kitout.assets import store
from kitout.cli.demo import app
from kitout.data.images.pixels import Pixels
from kitout.data.read.image_folders import load
from kitout.demo import vision_pictures, vision_report
from kitout.demo.vision import Split
from kitout.demo.vision_rows import ROWS
from kitout.evaluate.metrics.interval import wilson
from kitout.train.images import predict
from tiny_images import folder as pictures
from tiny_vision import folder as model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"), each=20)


def vision(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["vision", *map(str, words)])
    return done.exit_code, done.output


def small(model: Path, data: Path, out: Path, *words: object) -> tuple[int, str]:
    settings = ("--train", 24, "--test", 12, "--budget", 48)
    return vision("--model", model, "--data", data, "--out", out, *settings, *words)


def held(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_every_method_on_the_same_images(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "vision"
    code, said = small(model, data, out)
    assert code == 0, said
    results = held(out)
    assert [row["key"] for row in results["rows"]] == list(ROWS)
    assert results["data"]["train"] == 24
    assert results["majority"] == pytest.approx(1 / 3)
    for row in results["rows"]:
        right = sum(g == t for g, t in zip(row["guesses"], results["truth"], strict=True))
        assert row["right"] == right
        assert row["images"] == 12
        assert row["interval95"] == list(wilson(right, 12))
        assert row["training"]["images"] == 48
        assert row["training"]["seconds"] > 0
        assert row["trainable"] > 0
        assert row["title"] in said
        assert not (out / row["key"] / "checkpoint.safetensors").exists()
    for file in ("compare.png", "confusion.png", "errors.png"):
        with Image.open(out / file) as drawn:
            assert min(drawn.size) > 200
    for part in ("95 %", "commonest class", "min for the other", "best: ", "kit.load("):
        assert part in said
    linear, full = results["rows"][0], results["rows"][-1]
    assert linear["training"]["trunk_seconds"] > 0
    assert full["training"]["trunk_seconds"] == 0


def test_the_lines_it_prints_wear_its_adapters(model: Path, data: Path, tmp_path: Path) -> None:
    code, said = small(model, data, tmp_path, "--methods", "lora, adaptformer,linear,full", "--seed", 3)
    assert code == 0, said
    test = Split.of(load(data), 12, 24, seed=3).test
    results = held(tmp_path)
    for row in results["rows"]:
        lines: dict[str, Any] = {}
        exec("\n".join(vision_report.wearing(row, tmp_path / row["key"] / "adapter", results)), lines)
        assert lines["kit"]["best"].note["classes"] == ["blue", "green", "red"]
        assert predict(lines["kit"], "best", test, Pixels.of(model)).argmax(1).tolist() == row["guesses"]


def test_what_is_finished_is_not_done_again_unless_something_changed(model: Path, data: Path, tmp_path: Path) -> None:
    code, _ = small(model, data, tmp_path, "--methods", "lora")
    assert code == 0
    first = held(tmp_path)["rows"][0]
    code, said = small(model, data, tmp_path, "--methods", "lora,bitfit")
    assert code == 0
    assert "LoRA, rank 8: finished by an earlier run with the same settings, not done again" in said
    assert held(tmp_path)["rows"][1] == first
    for changed in (("--seed", 1), ("--size", 24), ("--budget", 32)):
        code, said = small(model, data, tmp_path, "--methods", "lora", *changed)
        assert code == 0
        assert "not done again" not in said
    small(model, data, tmp_path, "--methods", "lora")
    shutil.rmtree(tmp_path / "lora" / "adapter")
    assert "not done again" not in small(model, data, tmp_path, "--methods", "lora")[1]


def test_a_killed_method_goes_on_from_its_checkpoint(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kitout.train import images as training

    whole = small(model, data, tmp_path / "whole", "--methods", "lora")
    assert whole[0] == 0
    step, save = training._step, training.checkpoint.save

    def kill(*args: object) -> float:
        if args[3] == 2:
            raise KeyboardInterrupt
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_step", kill)
    monkeypatch.setattr(training.Recipe, "__post_init__", lambda self: object.__setattr__(self, "save_every", 0.0))
    code, said = small(model, data, tmp_path / "out", "--methods", "lora")
    assert code == 130
    assert "the same command goes on" in said
    monkeypatch.setattr(training, "_step", step)
    assert training.checkpoint.save is save
    code, said = small(model, data, tmp_path / "out", "--methods", "lora")
    assert code == 0
    row, expected = (held(tmp_path / name)["rows"][0] for name in ("out", "whole"))
    assert row["training"]["resumed_at"] == [2]
    assert row["training"]["losses"] == expected["training"]["losses"]
    assert row["guesses"] == expected["guesses"]
    assert "resumed from a checkpoint, so their seconds add up over runs: LoRA, rank 8" in said


def test_tables_with_named_columns_and_arrays(model: Path, data: Path, tmp_path: Path) -> None:
    lines = "".join(f"{f},{f.parent.name}\n" for f in sorted(data.glob("*/*.png")))
    (tmp_path / "a.csv").write_text("what,who\n" + lines)
    code, said = small(
        model, tmp_path / "a.csv", tmp_path / "out", "--methods", "linear", "--image", "what", "--label", "who"
    )
    assert code == 0, said
    assert held(tmp_path / "out")["names"] == ["blue", "green", "red"]


def test_faults_of_the_user_are_one_line_and_no_trace(model: Path, data: Path, tmp_path: Path) -> None:
    for words, expected in (
        (("--model", model, "--data", tmp_path / "no"), "unknown format|there is no file"),
        (("--model", model, "--data", tmp_path), "no class folders"),
        (("--model", tmp_path, "--data", data), "holds no config.json"),
        (("--model", model, "--data", data, "--methods", "lora,loar"), "'loar'; did you mean 'lora'"),
        (("--model", model, "--data", data, "--size", 30), "size 30 is no multiple of this model's patches of 8"),
        (("--model", model, "--data", data, "--budget", 0), "budget"),
    ):
        code, said = vision(*words, "--out", tmp_path / "out")
        assert code != 0
        assert re.search(expected, said), said
        assert "Traceback" not in said


def test_the_best_is_the_most_accurate_and_then_the_smallest() -> None:
    rows = [
        {"key": key, "accuracy": accuracy, "trainable": size}
        for key, accuracy, size in (("a", 0.5, 1), ("b", 0.9, 30), ("c", 0.9, 20))
    ]
    assert vision_report.best(rows)["key"] == "c"


def test_confusion_counts_and_the_order_of_errors() -> None:
    assert vision_pictures.counts([0, 1, 1, 0], [0, 1, 0, 0], 2).tolist() == [[2, 1], [0, 1]]
    assert vision_pictures._spread([3, 5, 7, 9], [0] * 6 + [1] * 4) == [3, 7, 5, 9]


def test_pictures_of_a_perfect_method_and_of_many_classes(tmp_path: Path, data: Path) -> None:
    test = load(data)
    names = [f"a class with a long name {i}" for i in range(30)]
    row = {"title": "x", "guesses": list(test.labels), "accuracy": 1.0, "images": len(test)}
    vision_pictures.errors(tmp_path / "errors.png", row, test.labels, names, test)
    vision_pictures.confusion(tmp_path / "confusion.png", row, test.labels, names)
    assert {f.name for f in tmp_path.glob("*.png")} == {"errors.png", "confusion.png"}


def test_without_matplotlib_there_are_no_pictures(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_pictures, "possible", lambda: False)
    code, said = small(model, data, tmp_path, "--methods", "linear")
    assert code == 0, said
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.assets
def test_the_embedded_images_are_all_there() -> None:
    images = load(store.get("mnist-5k") / "images.npz")
    assert len(images) == 5000
    assert images.names == tuple("0123456789")
    assert Split.of(images, 1000, 500, seed=0).majority == 0.1
