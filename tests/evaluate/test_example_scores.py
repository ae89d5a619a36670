"""Scores of single examples: what is read again gives the same metrics, intervals and tests."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from kitout.errors import FileError
from kitout.evaluate.example_scores import AdapterScores, keep_ratios, load_scores, save_scores
from kitout.evaluate.intervals.ratio import standard_error
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure, score_difference
from kitout.evaluate.metrics.registry import compute_measures


def every_measure(seed: int) -> dict[str, Measure]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 40).tolist()
    texts = [LossSums(float(rng.gamma(2.0)), int(rng.integers(1, 9)), 1) for _ in range(40)]
    several = rng.integers(0, 2, (40, 4)).tolist()
    found = {}
    found |= compute_measures("classification", rng.integers(0, 3, 40).tolist(), labels)
    found |= compute_measures("regression", rng.normal(size=40).tolist(), list(map(float, labels)))
    found |= {
        name: one for name, one in compute_measures("multilabel", several, several[::-1]).items() if "micro" in name
    }
    return found | compute_measures("language", texts)


def test_what_is_read_again_is_the_same(tmp_path: Path) -> None:
    base, tuned = every_measure(0), every_measure(1)
    file = tmp_path / "scores.safetensors"
    save_scores(file, {"a-s0": AdapterScores("digest", "base", keep_ratios(tuned), keep_ratios(base))})
    first = file.read_bytes()
    (one,) = load_scores(file).values()
    assert (one.test_data, one.baseline) == ("digest", "base")
    assert {"accuracy", "micro_f1", "rmse", "loss", "perplexity", "token_accuracy"} <= one.tuned.keys()
    assert "mcc" not in one.tuned, "it is no ratio of sums, and no mean of such"
    assert {name for name, own in one.tuned.items() if own.is_linearized} == {"macro_f1", "balanced_accuracy"}
    for name, scores in one.tuned.items():
        assert scores.measure.value == pytest.approx(tuned[name].value, rel=1e-12)
        if scores.is_linearized:
            continue
        ours, theirs = (astuple(one.score())[:4] for one in (scores.measure, tuned[name]))
        assert ours == pytest.approx(theirs, rel=1e-9)
        difference = score_difference(one.base[name].measure, scores.measure)
        assert difference == pytest.approx(score_difference(base[name], tuned[name]), rel=1e-9)
    save_scores(file, {"a-s0": one})
    assert file.read_bytes() == first


@pytest.mark.parametrize("name", ["accuracy", "micro_f1", "rmse", "loss", "perplexity"])
def test_linearized_scores_have_the_metric_as_their_mean_and_its_error_as_their_spread(name: str) -> None:
    (scores,) = keep_ratios({name: every_measure(2)[name]}).values()
    values = scores.per_example
    assert values.mean() == pytest.approx(scores.measure.value, rel=1e-9)
    assert values.std(ddof=1) / np.sqrt(scores.n) == pytest.approx(standard_error(scores.ratio.influence()), rel=1e-9)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_means_of_ratios_are_linearized(task: str) -> None:
    rng = np.random.default_rng(3)
    shape = (60,) if task == "classification" else (60, 4)
    labels, predicted = (rng.integers(0, 4 if task == "classification" else 2, shape) for _ in range(2))
    for name, measure in compute_measures(task, predicted.tolist(), labels.tolist()).items():
        if measure.influence_fn is None:
            continue
        step, ones = 1e-6, np.ones(60)
        moved = [(measure.value_fn(ones + step * (np.arange(60) == i)) - measure.value) / step for i in range(60)]
        assert measure.influence_fn() == pytest.approx(moved, abs=1e-6), name
        assert abs(measure.influence_fn().sum()) < 1e-12


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    save_scores(file, {"a": AdapterScores("digest", "base", keep_ratios(every_measure(0)))})
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FileError, match="damaged"):
        load_scores(file)
    with pytest.raises(FileError):
        load_scores(tmp_path / "none.safetensors")
