"""Images in an assessment: an adapter of an image model on a folder of classes, as its training evaluates it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kitout
from kitout.assess import run
from kitout.cli import app
from kitout.errors import ConfigError
from tiny_models import vision


def arrays(file: Path, number: int, seed: int = 0, classes: int = 2) -> Path:
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % classes
    images = (rng.integers(0, 60, (number, 32, 32, 3)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(file, images=images, labels=np.array(["dark", "light"])[labels])
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    model = vision(folder / "m")
    settings: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(arrays(folder / "a.npz", 24)), "test": 4, "validation": 0},
        "train": {"steps": 2, "batch_size": 4},
        "output": {"folder": str(folder / "run")},
    }
    kitout.train(settings, log=lambda _: None)
    return model, folder / "run" / "adapter"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))


def test_images_are_measured_as_they_are_predicted(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = trained
    predictor = kitout.load(adapter, base=str(model))
    file = arrays(tmp_path / "new.npz", 9, 1)
    (one,) = run(predictor.kit, None, [str(file)], cost=True).sets
    assert (one.kind, one.n, one.baseline) == ("image_classification", 9, "majority class")
    with np.load(file) as loaded:
        predicted = [each.label for each in predictor(list(loaded["images"]))]
        expected = np.mean([a == b for a, b in zip(predicted, loaded["labels"], strict=True)])
    assert one.measures["adapter"]["accuracy"].value == pytest.approx(expected)
    single = arrays(tmp_path / "one.npz", 3, 2, classes=1)  # one class, and few images, are enough to measure on
    assert run(predictor.kit, None, [{"path": str(single), "limit": 2}]).sets[0].n == 2


def test_what_is_no_set_of_its_images_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = trained
    predictor = kitout.load(adapter, base=str(model))
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array(["dark", "cat"]))
    with pytest.raises(ConfigError) as error:
        run(predictor.kit, None, [str(tmp_path / "other.npz"), str(tmp_path / "no")], suite="quick")
    for part in ("label 'cat'", "there is no file", "suite='quick'"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="not read in groups"):
        run(predictor.kit, None, [str(arrays(tmp_path / "a.npz", 4))], group="x")


def test_the_verb_measures_images(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = trained
    command = ["eval", str(adapter), "--model", str(model), "--data", str(arrays(tmp_path / "a.npz", 6)), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sets"][0]["scores"]["adapter"]["accuracy"]["n"] == 6
