"""One table of finished runs: shared metrics with intervals, seeds grouped, other test data said, no verdict."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from compare.run_folders import finished
from kitout.align.config.load import load_align
from kitout.compare import compare_runs, write_csv
from kitout.errors import ConfigError, PathError
from kitout.train.config import yaml_file
from kitout.train.run_folder import HEADER

BOTH = {"accuracy": 0.8, "loss": 0.4}


def test_a_row_has_metrics_with_intervals_and_cost(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", BOTH)
    two = finished(tmp_path / "two", {"accuracy": 0.7}, method={"name": "LoRA", "rank": 4})
    table = compare_runs([one, two])
    assert [row.label for row in table.rows] == ["one", "two"]
    assert table.metrics == ("accuracy",)
    assert table.same_test is True
    text = table.to_text(80)
    assert "80.0 (75.0 to 85.0)" in text
    assert "1,234" in text
    assert "1.0 GiB" in text
    assert "majority class" not in text, "the two runs have different baselines"
    notes = " ".join(table.notes)
    assert "left out, because not every run has it: loss (one)" in notes
    assert "no row is named the best" in notes
    # both intervals are 5 points wide on either side: 2.8 sqrt(2) 5 / 1.96
    assert (
        "smallest difference that 100 test examples can show (80 % power): accuracy 10.1 points. Rows are not" in notes
    )


def test_the_baseline_that_all_have_is_a_row(tmp_path: Path) -> None:
    table = compare_runs([finished(tmp_path / "a", BOTH), finished(tmp_path / "b", BOTH, method="IA3")])
    assert "majority class   " in str(table)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_the_terminal(tmp_path: Path, width: int) -> None:
    names = ["accuracy", "macro_f1", "balanced_accuracy", "loss"]
    runs = [finished(tmp_path / f"a-run-with-a-long-name-{k}", dict.fromkeys(names, 0.5 + k / 100)) for k in range(3)]
    runs.append(finished(tmp_path / "x", dict.fromkeys(names, 0.5), jobs=("first", "second")))
    text = compare_runs(runs).to_text(width)
    assert max(map(len, text.split("\n"))) <= width
    assert "x/second" in text
    assert width < 80 or "51.0 (46.0 to 56.0)" in text


def test_rows_of_different_test_sets_have_no_smallest_difference(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / name, {"accuracy": 0.5}, test_data={"adapter": name}, method=method)
        for name, method in (("a", "LoRA"), ("b", "IA3"))
    ]
    assert "smallest difference" not in " ".join(compare_runs(runs).notes)
    assert "smallest difference" not in " ".join(compare_runs(runs[:1]).notes)


def test_seeds_of_one_configuration_are_one_row_that_says_how_many(tmp_path: Path) -> None:
    values = {0: 0.7, 1: 0.8, 2: 0.9}
    runs = [finished(tmp_path / f"s{seed}", {"accuracy": value}, seed=seed) for seed, value in values.items()]
    other = finished(tmp_path / "other", {"accuracy": 0.5}, method="IA3")
    table = compare_runs([*runs, other])
    assert [row.seeds for row in table.rows] == [(0, 1, 2), (0,)]
    assert table.rows[0].score_text("accuracy") == "80.0 (3 seeds: 70.0 to 90.0)"
    (first, _) = table.to_dict()["rows"]
    assert first["num_seeds"] == 3
    assert first["metrics"]["accuracy"]["n"] == 3
    assert first["metrics"]["accuracy"]["over"] == "seeds"
    assert len(compare_runs([*runs, other], group_seeds=False).rows) == 4


def test_a_repetition_with_the_same_seed_is_no_second_seed(tmp_path: Path) -> None:
    seeds = {"a": 0, "again": 0, "b": 1}
    table = compare_runs([finished(tmp_path / name, BOTH, seed=seed) for name, seed in seeds.items()])
    assert [row.seeds for row in table.rows] == [(0, 1), (0,)]


def test_several_adapters_of_a_run_are_several_rows(tmp_path: Path) -> None:
    table = compare_runs([finished(tmp_path / "run", BOTH, jobs=("a", "b"))], group_seeds=False)
    assert [(row.label, row.seconds) for row in table.rows] == [("run/a", 5.0), ("run/b", 5.0)]
    assert any("memory is of the whole run" in note for note in table.notes)


def test_other_test_data_are_said(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", BOTH)
    two = finished(tmp_path / "two", BOTH, test_data={"adapter": "other"})
    fewer = finished(tmp_path / "fewer", BOTH, n=50)
    table = compare_runs([one, two, fewer])
    assert table.same_test is False
    assert [row.test for row in table.rows] == ["A", "B", "C"]
    assert any("measured on different test examples" in note and "B: two" in note for note in table.notes)
    assert "test set" in str(table)
    assert compare_runs([one, two]).rows[0].score("accuracy") is not None


def test_a_run_of_an_earlier_version_is_as_good_as_what_it_kept(tmp_path: Path) -> None:
    new = finished(tmp_path / "new", BOTH)
    same = finished(tmp_path / "same", BOTH, test_data={}, adapters=None)
    other = finished(tmp_path / "other", BOTH, test_data={}, data={"adapter": "rest"})
    assert compare_runs([new, same]).same_test is True
    table = compare_runs([new, other])
    assert table.same_test is None
    assert any("may differ" in note for note in table.notes)
    assert compare_runs([same]).rows[0].runs[0].method == "LoRA"


def test_a_run_without_a_test_split_has_its_cost_alone(tmp_path: Path) -> None:
    table = compare_runs([finished(tmp_path / "a", BOTH), finished(tmp_path / "none", {})])
    assert table.metrics == ("accuracy", "loss")
    assert table.same_test is True
    assert any("without a test split, and so without metrics: none" in note for note in table.notes)


def test_other_machines_and_a_diverged_run_are_said(tmp_path: Path) -> None:
    gpu = {"device": "cuda: y", "dtype": "bfloat16"}
    table = compare_runs([
        finished(tmp_path / "a", BOTH, stopped={"adapter": "the loss is not finite"}),
        finished(tmp_path / "b", BOTH, machine=gpu),
    ])  # fmt: skip
    notes = "\n".join(table.notes)
    assert "different devices" in notes
    assert "a: the loss is not finite" in notes
    assert "cuda: y" in str(table)


def test_a_value_that_is_not_finite(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", {"accuracy": 0.5})
    results = json.loads((folder / "results.json").read_text())
    results["comparisons"]["adapter"][0]["tuned"] |= {"value": None, "low": None, "high": None}
    (folder / "results.json").write_text(json.dumps(results))
    table = compare_runs([folder])
    assert "not finite" in str(table)
    json.dumps(table.to_dict(), allow_nan=False)


def test_all_that_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    good = finished(tmp_path / "good", BOTH)
    unfinished = finished(tmp_path / "unfinished", BOTH)
    (unfinished / "results.json").unlink()
    damaged = finished(tmp_path / "damaged", BOTH)
    (damaged / "results.json").write_text('{"trainable"')
    old = finished(tmp_path / "old", BOTH)
    (old / "results.json").write_text('{"tuned": 1, "base": 2}')
    odd = finished(tmp_path / "odd", BOTH, comparisons={"adapter": [{"name": "accuracy"}]})
    large = finished(tmp_path / "large", BOTH, memory=math.inf)
    none = finished(tmp_path / "nothing", BOTH, trainable={})
    (good / "adapter").mkdir()
    (good / "adapter" / "adapter.json").write_text("{}")
    folders = [
        good,
        good,
        unfinished,
        damaged,
        old,
        odd,
        large,
        none,
        good / "adapter",
        good / "run.yaml",
        tmp_path / "none",
    ]
    with pytest.raises(ConfigError) as raised:
        compare_runs(folders)
    text = str(raised.value)
    assert "10 errors" in text
    assert "is given twice" in text
    assert "unfinished is not finished (there is no results.json): the same `kitout train` command resumes it" in text
    assert "damaged, not JSON" in text
    assert text.count("is not one that this version of kitout writes") == 2
    assert "OverflowError" in text
    assert f"compare its run: {good}" in text
    assert f"run.yaml is a file: name the folder of a run, for example {good}" in text
    assert f"there is no folder {tmp_path / 'none'}; finished runs there: " in text


def test_two_runs_of_one_name_are_called_by_their_whole_path(tmp_path: Path) -> None:
    folders = [finished(tmp_path / parent / "run", BOTH) for parent in ("a", "b")]
    assert [row.label for row in compare_runs(folders).rows] == list(map(str, folders))


def test_no_two_rows_have_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's name behind its run's may be the path of another run: one of both was not ranked."""
    for parent in ("a", "b"):
        finished(tmp_path / parent / "run", BOTH)
    finished(tmp_path / "old" / "a", BOTH, jobs=("run", "other"))
    monkeypatch.chdir(tmp_path)
    labels = [row.label for row in compare_runs(["a/run", "b/run", "old/a"], group_seeds=False).rows]
    assert labels == ["a/run", "b/run", "old/a: run", "old/a: other"]


def test_names_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    adapters = [{"name": "adapter", "method": "LoRA\x1b[2J", "seconds": 1.0}]
    assert "\x1b" not in str(compare_runs([finished(tmp_path / "a", BOTH, adapters=adapters)]))


def test_csv_has_a_line_per_row(tmp_path: Path) -> None:
    table = compare_runs([finished(tmp_path / "a", BOTH), finished(tmp_path / "b", BOTH, method="IA3")])
    write_csv(table, tmp_path / "new" / "table.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "table.csv").read_text())))
    assert [row["run"] for row in rows] == ["a", "b"]
    assert float(rows[0]["accuracy_low"]) == pytest.approx(0.75)
    with pytest.raises(ConfigError, match=r"ends with \.csv"):
        write_csv(table, tmp_path / "table.txt")
    with pytest.raises(PathError, match="cannot be written"):
        write_csv(table, tmp_path / "new" / "table.csv" / "x.csv")


def test_stages_of_an_alignment_are_runs_whose_losses_differ(tmp_path: Path) -> None:
    """Their run.yaml holds more than a run's; one loss with two seeds is one row, two losses are two."""
    runs = []
    for name, beta, seed in (("a", 0.1, 0), ("b", 0.1, 1), ("c", 0.5, 0)):
        stage = {"kind": "dpo", "data": "d", "loss": {"beta": beta}, "name": "adapter", "train": {"seed": seed}}
        (run,) = load_align({"model": "tiny", "output": str(tmp_path / name), "stages": [stage]}).runs()
        runs.append(finished(tmp_path / name, {"accuracy": 0.8}))
        (tmp_path / name / "run.yaml").write_text(f"{HEADER}\n{yaml_file.to_yaml(run.to_dict())}", encoding="utf-8")
    assert [len(row.runs) for row in compare_runs(runs).rows] == [2, 1]
