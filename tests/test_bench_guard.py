"""The guard of the benchmarks: what is worse than its bound fails the run, and nothing goes unseen.

Lines here are made up; nothing is measured. The bounds of the repository are read, not held against anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from project import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def guard() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import guard

        yield guard
    finally:
        sys.path.remove(str(BENCHMARKS))


def judge(guard: Any, tmp_path: Path, bounds: str, *lines: Any, full: bool = False) -> tuple[int, str]:
    file = tmp_path / "bounds.toml"
    file.write_text(f"[a]\n{bounds}\n", encoding="utf-8")
    code, messages = guard.judge(
        {"a": [guard.Line(*line, "<= 1 x", True) for line in lines]}, guard.read_bounds(file), full
    )
    return code, "\n".join(messages)


@pytest.mark.parametrize(
    ("bound", "measured", "code"),
    [
        ("at_most = 1.1", "1.050 x (median of rounds 1.040)", 0),
        ("at_most = 1.1", "1.100 x (median of rounds 1.100)", 0),
        ("at_most = 1.1", "1.200 x (median of rounds 1.040)", 0),  # noise: one of the two
        ("at_most = 1.1", "1.040 x (median of rounds 1.200)", 0),
        ("at_most = 1.1", "1.110 x (median of rounds 1.120)", 1),
        ("at_most = 1.1", "1.11 x", 1),
        ("at_most = 1.1", "0.90 s", 0),
        ("at_least = 2.0", "2.10 x (median of rounds 1.90)", 0),
        ("at_least = 2.0", "1.80 x (median of rounds 1.90)", 1),
        ("at_most = 1e-4", "at most 2.8e-06 apart over 5 steps", 0),
        ("at_most = 1e-4", "at most 2.8e-03 apart over 5 steps", 1),
        ("at_most = 1.1", "fast", 2),
    ],
)
def test_worse_in_best_and_median_fails(guard: Any, tmp_path: Path, bound: str, measured: str, code: int) -> None:
    found, text = judge(guard, tmp_path, f'"m" = {{ {bound} }}', ("m", measured))
    assert found == code
    assert bool(text) is bool(code)


def test_a_given_figure_is_taken_before_the_text(guard: Any) -> None:
    line = guard.Line("m", "1: 0.003, 8: 0.009", "", True, value=0.009)
    assert guard.figures(line) == (0.009, 0.009)


@pytest.mark.parametrize("bound", ["at_most = 1.1", "at_least = 1.1"])
def test_no_number_is_worse_than_any_bound(guard: Any, tmp_path: Path, bound: str) -> None:
    file = tmp_path / "bounds.toml"
    file.write_text(f'[a]\n"m" = {{ {bound} }}\n', encoding="utf-8")
    line = guard.Line("m", "nan x", "", True, value=float("nan"))
    assert guard.judge({"a": [line]}, guard.read_bounds(file), False)[0] == guard.WORSE


def test_every_line_has_a_bound_and_every_bound_a_line(guard: Any, tmp_path: Path) -> None:
    known = '"m" = { at_most = 1.1 }\n"long" = { at_most = 1, full_only = true }'
    assert judge(guard, tmp_path, known, ("m", "1.0 x"))[0] == guard.OK
    code, text = judge(guard, tmp_path, known, ("m", "1.0 x"), ("new", "1.0 x"))
    assert code == guard.BROKEN
    assert "no bound for 'new'" in text
    code, text = judge(guard, tmp_path, known)
    assert code == guard.BROKEN
    assert "'m' has a bound and was not measured" in text
    assert "'long'" not in text
    assert "'long'" in judge(guard, tmp_path, known, ("m", "1.0 x"), full=True)[1]
    assert judge(guard, tmp_path, known, ("m", "1.0 x"), ("m", "1.0 x"))[0] == guard.BROKEN
    assert judge(guard, tmp_path, known, ("m", "9 x"), ("new", "1 x"))[0] == guard.BROKEN


@pytest.mark.parametrize(
    "entry", ["1.1", "{ }", "{ at_most = 1, at_least = 2 }", "{ at_most = 1, limit = 2 }", "{ at_most = true }"]
)
def test_a_bound_that_is_none_is_refused(guard: Any, tmp_path: Path, entry: str) -> None:
    with pytest.raises(guard.BoundsError, match="'m'"):
        judge(guard, tmp_path, f'"m" = {entry}')


def test_the_bounds_of_the_repository(guard: Any) -> None:
    bounds = guard.read_bounds()
    registry = re.search(r"SHORT: .*?\{\n(.*?)\n\}\n", (BENCHMARKS / "run.py").read_text(encoding="utf-8"), re.DOTALL)
    assert registry is not None
    names = set(re.findall(r'^    "(\w+)":', registry[1], re.MULTILINE))
    assert set(bounds) == names
    assert all((BENCHMARKS / f"{name}.py").is_file() for name in names)
    assert all(bound.target for part in bounds.values() for bound in part.values())


def test_an_error_in_one_benchmark_hides_no_other(
    guard: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    def broken() -> Iterator[Any]:
        yield guard.Line("first", "1.000 x", "<= 1 x", True)
        raise RuntimeError("in the middle")

    def sound() -> Iterator[Any]:
        yield guard.Line("second", "1.000 x", "<= 1 x", True)

    for name, lines in {"broken": broken, "sound": sound}.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(run=lines))
        monkeypatch.setitem(run.SHORT, name, {})
    monkeypatch.setattr(run, "NAMES", ("broken", "sound"))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    assert run.main() == guard.BROKEN
    printed = capsys.readouterr()
    assert "second" in printed.out
    assert "ended with an error, see above: broken" in printed.out
    assert "in the middle" in printed.err


def test_the_gpu_benchmark_runs_its_small_shapes_here(guard: Any) -> None:
    import gpu
    import torch

    lines = list(gpu.measure(torch.device("cpu"), gpu.SMALL, 1, compiles=False))
    assert [line.metric.split(", against")[0] for line in lines] == [
        *["GPU: LoRA r=8 all-linear step, 2 x 16 bf16, eager"] * 2,
        *["GPU: LoRA r=8 all-linear step, 3 x 16 bf16, eager"] * 2,
        "GPU: decoding 4 rows with 2 LoRAs by row",
        "GPU: decoding 4 rows with 4 LoRAs by row",
    ]
    assert all(guard.figures(line)[0] > 0 for line in lines)
    assert bool(gpu.not_measured()) is not torch.cuda.is_available()


def test_the_bounds_of_the_gpu_name_its_lines(guard: Any) -> None:
    import gpu

    sizes = gpu.Sizes()
    metrics = {
        f"GPU: LoRA r={gpu.RANK} all-linear step, {rows} x {tokens} bf16, {how}, against {of}"
        for rows, tokens, how in (*((*b, "eager") for b in sizes.batches), (*sizes.batches[0], "compiled by block"))
        for of in ("PEFT", "the floor")
    } | {f"GPU: decoding {sizes.adapters[-1]} rows with {n} LoRAs by row, against one" for n in sizes.adapters[1:]}
    assert set(guard.read_bounds()["gpu"]) == metrics
