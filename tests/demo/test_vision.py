"""The vision demo is a preset of `kitout train`: all methods in one run, through the command line a user types."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from kitout.assets import store
from kitout.cli.demo import app
from kitout.data.read.image_folders import load_images
from kitout.data.split import split_images
from kitout.demo.vision import JOBS, VisionDemo, preset
from kitout.evaluate.intervals.resampled import wilson_interval
from kitout.evaluate.report import plots
from tiny_images import folder as image_folder
from tiny_vision import folder as model_folder

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), each=20)


def vision(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["vision", *map(str, args)])
    return result.exit_code, result.output


def small_run(model: Path, data: Path, out: Path, *args: object) -> tuple[int, str]:
    sizes = ("--train", 24, "--test", 12, "--budget", 48)
    return vision("--model", model, "--data", data, "--out", out, *sizes, *args)


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def test_every_method_on_the_same_images(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "vision"
    code, output = small_run(model, data, out)
    assert code == 0, output
    saved = results(out)
    assert [row["name"] for row in saved["adapters"]] == list(JOBS)
    for row in saved["adapters"]:
        correct = sum(g == t for g, t in zip(saved["predicted"][row["name"]], saved["true"][row["name"]], strict=True))
        score = row["score"]
        assert (score["value"], [score["low"], score["high"]]) == (correct / 12, list(wilson_interval(correct, 12)))
        assert row["examples"] == 48
        assert row["seconds"] > 0
        assert row["processor_seconds"] > 0
        assert (out / "adapter" / row["name"] / "README.md").is_file()
        for picture in ("confusion", "errors"):
            with Image.open(out / f"{picture}-{row['name']}.png") as plot:
                assert min(plot.size) > 200
        assert re.search(rf"^{row['name']} +{row['trainable']:,} ", output, re.MULTILINE)
    assert (out / "comparison.png").is_file()
    for text in ("95 % interval", "majority class", "one seed each", "kitout.load(", "train 24, "):
        assert text in output
    page = (out / "report.html").read_text()
    for text in (
        "Adapters side by side",
        "always the majority class",
        "Which class is taken for which",
        "Test images, with",
    ):
        assert text in page


def test_the_same_command_again_and_without_pictures(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    for expected in ("one seed each", "finished: see results.json"):
        code, output = small_run(model, data, tmp_path, "--methods", "linear, bitfit")
        assert code == 0, output
        assert expected in output
    assert not list(tmp_path.glob("*.png"))
    code, output = small_run(model, data, tmp_path, "--methods", "linear,lora")
    assert code == 1
    assert "output.folder" in output


def test_each_method_has_its_recipe() -> None:
    rates = {job.output.name: (job.train.lr, job.train.head_lr, job.train.weight_decay, job.train.head)
             for job in preset(VisionDemo()).per_job()}  # fmt: skip
    assert rates == {
        "linear": (3e-3, 3e-3, 1e-4, "linear"), "bitfit": (3e-3, 3e-3, 0.0, "linear"),
        "vpt-shallow": (3e-2, 3e-3, 1e-4, "linear"), "vpt-deep": (1e-2, 3e-3, 1e-4, "linear"),
        "ssf": (3e-3, 3e-3, 0.0, "linear"), "lora": (1e-3, 3e-3, 1e-4, "linear"),
        "adaptformer": (1e-2, 3e-3, 1e-4, "batchnorm"), "full": (1e-5, 3e-3, 1e-4, "linear"),
    }  # fmt: skip
    config = preset(VisionDemo())
    assert (config.model.name, config.data.image_size, config.train.steps) == ("dinov2-small", 112, 94)
    assert preset(VisionDemo(model=Path("elsewhere"))).data.image_size is None


def test_tables_with_named_columns(model: Path, data: Path, tmp_path: Path) -> None:
    lines = "".join(f"{f},{f.parent.name}\n" for f in sorted(data.glob("*/*.png")))
    (tmp_path / "a.csv").write_text("what,who\n" + lines)
    code, output = small_run(
        model, tmp_path / "a.csv", tmp_path / "out", "--methods", "linear", "--image", "what", "--label", "who"
    )
    assert code == 0, output
    assert (tmp_path / "out" / "confusion.png").is_file()


def test_errors_of_the_user_are_one_line_and_no_traceback(model: Path, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, expected in (
        (("--model", model, "--data", tmp_path / "no"), "unknown format|there is no file"),
        (("--model", model, "--data", empty), "no class folders"),
        (("--model", tmp_path, "--data", data), "no model is there"),
        (("--model", model, "--data", data, "--methods", "lora,loar"), "'loar'; did you mean 'lora'"),
        (("--model", model, "--data", data, "--size", 30), "size 30 is not a multiple of this model's patches of 8"),
        (("--model", model, "--data", data, "--budget", 0), "budget"),
    ):
        code, output = vision(*args, "--out", tmp_path / "out")
        assert code != 0
        assert re.search(expected, output), output
        assert "Traceback" not in output


@pytest.mark.assets
def test_the_built_in_images_are_all_there() -> None:
    images = load_images(store.fetch_asset("mnist-5k") / "images.npz")
    assert len(images) == 5000
    assert images.label_names == tuple("0123456789")
    assert split_images(images, 0, 1000, 0, 500).majority_accuracy == 0.1
