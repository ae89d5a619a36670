"""Plots are PNGs of what is in the rows; what is not a number is skipped; nothing half-written is left."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from kitout.errors import ConfigError
from kitout.evaluate.report import plots

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")

PNG = b"\x89PNG\r\n\x1a\n"


def rows(prefix: str = "", eval_prefix: str = "eval_") -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, f"{eval_prefix}accuracy": 0.4, f"{eval_prefix}loss": 3.0}]
    for step in range(1, 61):
        lines.append({"step": step, f"{prefix}loss": 1 + 9 / step, f"{prefix}learning_rate": 1e-3, "epoch": step / 60})
        if step % 20 == 0:
            interval = {f"{eval_prefix}accuracy_low": 0.35, f"{eval_prefix}accuracy_high": 0.75, "eval_runtime": 2.0}
            lines.append(
                {"step": step, f"{eval_prefix}loss": 1.0, f"{eval_prefix}accuracy": 0.4 + step / 200} | interval
            )
    return lines


def size(png_bytes: bytes) -> tuple[int, int]:
    assert png_bytes.startswith(PNG)
    return int.from_bytes(png_bytes[16:20], "big"), int.from_bytes(png_bytes[20:24], "big")


def test_series_are_split_by_adapter_and_by_training_or_validation() -> None:
    training, validation = plots.collect_series(
        [*rows("legal/", "eval_legal/"), *rows("medic/", "medic/eval_"), *rows()]
    )
    assert {key for key in training if key[1] == "loss"} == {("legal", "loss"), ("medic", "loss"), ("", "loss")}
    assert set(validation) == {(job, metric) for job in ("legal", "medic", "") for metric in ("loss", "accuracy")}
    series = validation["legal", "accuracy"]
    assert series.steps == [0, 20, 40, 60]
    assert series.values == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert series.intervals == [(0.4, 0.4), (0.35, 0.75), (0.35, 0.75), (0.35, 0.75)]
    assert validation["medic", "accuracy"] == series


def test_what_is_not_a_number_is_skipped() -> None:
    odd_rows = [
        {"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"step": 3, "loss": "2"}, {"step": 4, "loss": True},
        {"loss": 2.0}, {"step": 5, "loss": 2.0, "eval_loss": math.inf}, {"step": None, "loss": 1.0},
    ]  # fmt: skip
    training, validation = plots.collect_series(odd_rows)
    assert training == {("", "loss"): plots.MetricSeries([5.0], [2.0], [(2.0, 2.0)])}
    assert validation == {}
    size(plots.plot_training(odd_rows))


def test_smoothing_keeps_a_line_and_the_length() -> None:
    straight = [float(i) for i in range(200)]
    assert plots.smooth(straight)[10:-10] == pytest.approx(straight[10:-10])
    assert plots.smooth([4.0]) == [4.0]
    assert plots.smooth([]) == []


def test_more_metrics_make_more_panels() -> None:
    one, two = size(plots.plot_training([{"step": 1, "loss": 2.0}])), size(plots.plot_training(rows()))
    assert two[0] > 1.8 * one[0]
    assert two[1] == one[1]
    assert size(plots.plot_training([{"step": 1} | {f"eval_m{i}": 0.5 for i in range(9)}]))[1] > 1.8 * one[1]
    assert size(plots.plot_training([])) == one
    both = [*rows("legal/", "eval_legal/"), *rows("medic/", "eval_medic/")]
    assert plots.plot_training([*both, *rows()]) == plots.plot_training(both)  # means over adapters are not a third one
    assert size(plots.plot_training(both)) == two


def test_lengths(tmp_path: Path) -> None:
    png_bytes = plots.plot_lengths({"train": [3, 40, 500], "test": [2], "none": []}, max_length=512)
    size(png_bytes)
    file = plots.write_png(tmp_path / "lengths.png", png_bytes)
    assert file.read_bytes() == png_bytes
    assert [p.name for p in tmp_path.iterdir()] == ["lengths.png"]
    size(plots.plot_lengths({"train": [0]}))
    with pytest.raises(ConfigError, match="there are no examples"):
        plots.plot_lengths({"train": []})


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    with pytest.raises(ConfigError, match=r" install .*\[eval\]'"):
        plots.plot_training(rows())
