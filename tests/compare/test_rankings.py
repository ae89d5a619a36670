"""Rows against each other: groups with letters from three seeds, nothing between test sets, mean ranks from five."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compare.run_folders import finished, ranked
from kitout.compare import compare_runs
from kitout.compare.rankings import rank_rows
from kitout.compare.run_row import RunRow
from kitout.errors import ConfigError
from kitout.evaluate.example_scores import ExampleScores
from kitout.evaluate.intervals.ratio import Ratio

METHODS: dict[str, Any] = {"lora": "LoRA", "ia3": "IA3", "bitfit": "BitFit"}
ACCURACIES = {"lora": 0.9, "ia3": 0.88, "bitfit": 0.5}


def test_methods_of_a_run_with_seeds_are_ranked_as_groups(tmp_path: Path) -> None:
    table = compare_runs([ranked(tmp_path / "run", ACCURACIES, methods=METHODS, n=200)])
    assert [(row.label, row.seeds) for row in table.rows] == [
        (f"run/{name}", (0, 1, 2)) for name in ACCURACIES
    ]  # fmt: skip
    assert table.letters("accuracy") == {"run/lora": "a", "run/ia3": "a", "run/bitfit": "b"}
    assert any("Holm over 3 pairs" in note and "smallest difference" in note for note in table.notes)
    assert "group" in str(table)
    (ranking,) = table.to_dict()["rankings"]
    assert {"names", "means", "letters", "pairs", "smallest"} <= ranking.keys()
    plain, more = (list(csv.DictReader(io.StringIO(table.to_csv(groups=groups)))) for groups in (False, True))
    assert "accuracy_group" not in plain[0]
    assert [row["accuracy_group"] for row in more] == ["a", "a", "b"]


def test_a_metric_without_a_verdict_is_said(tmp_path: Path) -> None:
    folder = ranked(tmp_path / "run", ACCURACIES, methods=METHODS, n=200)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for changes in results["comparisons"].values():
        changes.append({**changes[0], "name": "mcc"})
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    table = compare_runs([folder])
    assert table.letters("mcc") == {}
    assert any(note.startswith("Matthews correlation: no verdict: this metric is no mean") for note in table.notes)


def test_runs_that_differ_in_their_seed_are_one_method_like_any_other(tmp_path: Path) -> None:
    runs = [
        ranked(tmp_path / f"{name}{seed}", {name: accuracy}, seed=seed, method=METHODS[name], start=k)
        for k, (name, accuracy) in enumerate([("lora", 0.9), ("bitfit", 0.5)])
        for seed in range(3)
    ]
    table = compare_runs(runs)
    assert [len(row.runs) for row in table.rows] == [3, 3]
    assert set(table.letters("accuracy").values()) == {"a", "b"}
    assert str(table) == str(compare_runs(runs)), "equal inputs give equal tables"
    alone = compare_runs(runs, group_seeds=False)
    assert alone.letters("accuracy") == {}
    assert any("no ranking: 1 seed" in note for note in alone.notes)


def test_no_verdict_between_test_sets(tmp_path: Path) -> None:
    one = ranked(tmp_path / "one", {"lora": 0.9, "ia3": 0.5}, methods=METHODS)
    two = ranked(tmp_path / "two", {"lora": 0.9, "ia3": 0.5}, methods=METHODS, test="other", start=5)
    table = compare_runs([one, two])
    assert [ranking.test for ranking in table.rankings] == ["A", "B"]
    names = [name for ranking in table.to_dict()["rankings"] for pair in ranking["pairs"] for name in (pair["name"],)]
    assert len(names) == 2
    assert any("there is no verdict between them" in note for note in table.notes)
    assert any("(test set B)" in note for note in table.notes)


def test_runs_without_scores_compare_as_before(tmp_path: Path) -> None:
    old = finished(tmp_path / "old", {"accuracy": 0.8})
    table = compare_runs([old])
    assert (table.rankings, table.tasks) == ((), None)
    both = compare_runs([old, ranked(tmp_path / "new", {"lora": 0.9, "ia3": 0.5}, methods=METHODS)])
    assert "old" not in both.letters("accuracy")
    assert any("without scores.safetensors: old" in note for note in both.notes)


def test_a_damaged_file_of_scores_is_reported_with_the_rest(tmp_path: Path) -> None:
    folder = ranked(tmp_path / "run", {"lora": 0.9})
    (folder / "scores.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"2 errors(?s:.*)scores\.safetensors is damaged"):
        compare_runs([folder, tmp_path / "none"])


def test_from_five_test_sets_methods_have_mean_ranks(tmp_path: Path) -> None:
    runs = [
        ranked(tmp_path / f"task{k}", {"lora": 0.9, "ia3": 0.7, "bitfit": 0.5}, methods=METHODS, test=f"test {k}",
               file=f"data{k}.csv", start=k)
        for k in range(6)
    ]  # fmt: skip
    assert compare_runs(runs[:4]).tasks is None
    table = compare_runs(runs)
    assert table.tasks is not None
    assert table.tasks.names == ("LoRA", "IA3", "BitFit")
    assert table.tasks.num_tasks == 6
    assert any(note.startswith("over test sets: the methods differ (Friedman over 6 tasks") for note in table.notes)
    assert table.to_dict()["tasks"]["mean_ranks"] == list(table.tasks.mean_ranks)


def test_a_run_that_diverged_is_the_worst_of_its_test_set(tmp_path: Path) -> None:
    """It once took the whole table with it."""
    runs = [
        finished(tmp_path / f"{method}{k}", {"accuracy": math.nan if (method, k) == ("LoRA", 2) else value},
                 method=method, file=f"d{k}.csv", test_data={"adapter": f"test {k}"})
        for method, value in (("LoRA", 0.9), ("IA3", 0.7)) for k in range(5)
    ]  # fmt: skip
    table = compare_runs(runs)
    assert table.tasks is not None
    assert table.tasks.mean_ranks == (1.2, 1.8)
    assert "not finite" in str(table)


def test_without_a_common_metric_there_is_a_reason(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / f"{method}{k}", {metric: 0.5}, method=method, file=f"d{k}.csv",
                 test_data={"adapter": f"test {k}"})
        for method, metric in (("LoRA", "accuracy"), ("IA3", "f1")) for k in range(5)
    ]  # fmt: skip
    table = compare_runs(runs)
    assert table.tasks is None
    assert any(note.startswith("over test sets: no ranking") for note in table.notes)


def test_losses_over_other_tokens_are_not_ranked() -> None:
    def row(label: str, tokens: float) -> RunRow:
        losses = np.random.default_rng(len(label)).random(20) * tokens
        scores = {"loss": ExampleScores(Ratio(losses, np.full(20, tokens)), higher_is_better=False, share=False)}
        run = SimpleNamespace(test_scores=scores, scores={}, recipe="")
        return RunRow(label, (run,) * 3, "A")  # type: ignore[arg-type]

    (one,) = rank_rows([row("a", 10.0), row("bb", 8.0)], ["loss"])
    assert one.ranking is None
    assert "the examples are different tokens to these models" in one.caption
    (other,) = rank_rows([row("a", 10.0), row("bb", 10.0)], ["loss"])
    assert other.letters


def test_forgetting_is_a_column_where_it_was_measured(tmp_path: Path) -> None:
    folder = ranked(tmp_path / "run", {"lora": 0.9, "ia3": 0.5}, methods=METHODS)
    results = json.loads((folder / "results.json").read_text())
    sets = {
        "obqa": {"metric": "acc_norm", "difference": -0.04}, "piqa": {"metric": "acc", "difference": 0.01},
        "wiki": {"metric": "bits_per_byte", "difference": 0.5},
    }  # fmt: skip
    results["forgetting"] = {name: {"summary": "", "sets": sets} for name in results["trainable"]}
    (folder / "results.json").write_text(json.dumps(results))
    table = compare_runs([folder])
    assert [row.forgetting for row in table.rows] == pytest.approx([0.015, 0.015])
    assert "forgotten" in str(table)
    assert "1.5" in str(table)
    assert "not comparable" not in str(table)
    other = finished(tmp_path / "full", {"accuracy": 0.7})
    values = json.loads((other / "results.json").read_text())
    values["forgetting"] = {"adapter": {"summary": "", "sets": {"obqa": sets["obqa"] | {"n": 500}}}}
    (other / "results.json").write_text(json.dumps(values))
    (found,) = (one for one in compare_runs([folder, other]).notes if one.startswith("forgotten was"))
    assert found.endswith(": run/lora, run/ia3: obqa, piqa; full: obqa (500)")
