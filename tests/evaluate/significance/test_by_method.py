"""Methods with seeds: means, differences to the base, and a verdict from three seeds of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kitout.evaluate.example_scores import ExampleScores, keep_ratios
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.significance.by_method import SeedScore, compare_by_method, rank_scores
from kitout.evaluate.significance.many import rank_methods

N = 200


def shares(rate: float, seeds: int = 3, start: int = 0) -> list[ExampleScores]:
    drawn = [np.random.default_rng(start + s).random(N) < rate for s in range(seeds)]
    return [ExampleScores(Ratio(one.astype(float), np.ones(N)), is_correct=True) for one in drawn]


def seeds_of(scores: Sequence[ExampleScores]) -> list[SeedScore]:
    return [SeedScore(f"x-s{k}", k, one.measure.value, 0.1, -0.05, 0.25) for k, one in enumerate(scores)]


def test_methods_with_three_seeds_have_a_verdict() -> None:
    scores = {"good": shares(0.9), "also": shares(0.88, start=9), "bad": shares(0.5, start=30)}
    found = compare_by_method(
        "accuracy", {k: seeds_of(v) for k, v in scores.items()}, scores, share=True, baseline="base"
    )
    assert found.ranking is not None
    assert found.letters["good"] == found.letters["also"] == "a"
    assert found.letters["bad"] == "b"
    assert found.methods[0].mean == pytest.approx(np.mean([one.measure.value for one in scores["good"]]))
    assert "Holm over 3 pairs" in found.caption
    (verdict,) = [text for text in found.verdicts_of("bad") if "good" in text]
    assert verdict.startswith("worse than good by ")
    table = found.text
    assert "mean accuracy %" in table
    assert "+10.0 (-5.0 to +25.0)" in table
    expected = rank_methods({k: [one.ratio.numerators for one in v] for k, v in scores.items()})
    assert expected == found.ranking


def test_fewer_seeds_have_no_verdict_and_are_said() -> None:
    two, _ = rank_scores({"a": shares(0.9, 2), "b": shares(0.5, 2)})
    assert two is not None
    assert not two.has_verdict
    assert two.pairs[0].is_better is None
    ranking, note = rank_scores({"a": shares(0.9), "b": shares(0.5), "c": shares(0.6, 1)})
    assert ranking is not None
    assert ranking.names == ("a", "b")
    assert note == "not in the ranking: c has fewer than 3 seeds"


def test_a_loss_per_token_and_an_f1_are_ranked_too() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, N).astype(float)
    losses = {
        name: [ExampleScores(Ratio(tokens * rng.gamma(4, size, N), tokens), False, False) for _ in range(3)]
        for name, size in (("low", 0.2), ("high", 0.5))
    }
    ranking, _ = rank_scores(losses)
    assert ranking is not None
    assert ranking.names == ("low", "high")
    assert ranking.letters == ("a", "b")
    assert ranking.means[0] == pytest.approx(np.mean([one.measure.value for one in losses["low"]]))
    f1 = {
        name: [ExampleScores(Ratio(2 * hits, rng.integers(2, 5, N) + 2.0)) for hits in rng.random((3, N)) * size]
        for name, size in (("good", 2), ("bad", 0.5))
    }
    ranking, _ = rank_scores(f1)
    assert ranking is not None
    assert ranking.pairs[0].share
    assert "points" in ranking.pairs[0].verdict


def macro_f1s(rng: np.random.Generator, labels: np.ndarray, rate: float) -> list[ExampleScores]:
    """Three seeds that are right on the same easy examples, and guess on others."""
    chance = np.clip(rate + rng.normal(0, 0.3, len(labels)), 0, 1)
    drawn = [np.where(rng.random(len(labels)) < chance, labels, rng.integers(0, 4, len(labels))) for _ in range(3)]
    every = [compute_measures("classification", one.tolist(), labels.tolist()) for one in drawn]
    return [keep_ratios(measures)["macro_f1"] for measures in every]


def test_macro_f1_has_a_verdict_over_seeds() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 300, p=[0.55, 0.25, 0.15, 0.05])
    ranking, note = rank_scores({"a": macro_f1s(rng, labels, 0.9), "b": macro_f1s(rng, labels, 0.4)})
    assert ranking is not None
    assert not note
    assert ranking.letters == ("a", "b")
    assert "points" in ranking.pairs[0].verdict
    false = 0
    for _ in range(150):
        labels = rng.choice(4, 150, p=[0.4, 0.3, 0.2, 0.1])
        equal, _ = rank_scores({"a": macro_f1s(rng, labels, 0.6), "b": macro_f1s(rng, labels, 0.6)})
        assert equal is not None
        false += equal.pairs[0].is_better is not None
    assert false <= 9, "at most 6 %"


def test_macro_f1_of_tags_has_one_too() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.choice(["NOUN", "VERB", "ADJ"], 12).tolist() for _ in range(80)]
    scores: dict[str, list[ExampleScores]] = {"a": [], "b": []}
    for name, right in (("a", 0.9), ("b", 0.4)) * 3:
        guessed = [[tag if rng.random() < right else "NOUN" for tag in row] for row in rows]
        scores[name].append(keep_ratios(compute_measures("tokens", guessed, rows))["macro_f1"])
    ranking, _ = rank_scores(scores)
    assert ranking is not None
    assert ranking.letters == ("a", "b")


def test_agreement_is_not_certain_of_linearized_shares_either() -> None:
    rng = np.random.default_rng(0)
    same = macro_f1s(rng, rng.choice(4, 80), 0.6)[:1] * 3
    ranking, _ = rank_scores({"a": same, "b": same})
    assert ranking is not None
    # 2.8 standard errors of one example in 80, with t on 79 degrees; it was "0.0 points"
    assert "(80 % power): 3.5 points on 80 test examples" in ranking.caption


def test_how_a_metric_was_measured_is_in_the_table() -> None:
    scores = {"a": shares(0.9), "b": shares(0.5)}
    found = compare_by_method(
        "rouge_l", {k: seeds_of(v) for k, v in scores.items()}, scores, share=True, baseline="base",
        measured="by character",
    )  # fmt: skip
    assert found.title == "ROUGE-L (by character) %"
    assert "mean ROUGE-L (by character) %" in found.text


def test_groups_decide_how_sure_a_verdict_is() -> None:
    groups = np.repeat(np.arange(10), N // 10)
    rng = np.random.default_rng(0)

    def by_group(rate: float) -> list[ExampleScores]:
        """Whole passages are right or wrong."""
        passages = rng.random(10) < rate
        own = np.repeat(passages, N // 10).astype(float)
        return [ExampleScores(Ratio(own, np.ones(N)), is_correct=True, groups=groups) for _ in range(3)]

    scores = {"a": by_group(0.7), "b": by_group(0.5)}
    ranking, _ = rank_scores(scores)
    without, _ = rank_scores({k: [replace(one, groups=None) for one in own] for k, own in scores.items()})
    assert ranking is not None
    assert without is not None
    assert ranking.pairs[0].example_error > 3 * without.pairs[0].example_error
    assert f"{N} test examples in 10 groups" in ranking.pairs[0].verdict
    known, _ = rank_scores({"a": scores["a"], "b": [replace(one, groups=None) for one in scores["b"]]})
    assert known is not None
    assert known.pairs[0].num_groups == 10, "groups are facts of the data: one run that knows them is enough"
    other = [replace(one, groups=np.arange(N) % 10) for one in scores["b"]]
    assert rank_scores({"a": scores["a"], "b": other}) == (
        None,
        "no verdict: the same examples are in different groups",
    )


def test_what_cannot_be_tested_is_said() -> None:
    assert rank_scores({"a": shares(0.5)}) == (None, "")
    assert "no mean over examples" in rank_scores({"a": [], "b": []})[1]
    broken = [ExampleScores(Ratio(np.full(N, np.nan), np.ones(N))) for _ in range(3)]
    assert rank_scores({"a": shares(0.5), "b": broken}) == (
        None,
        "not in the ranking: b has values that are not finite",
    )
    unknown = [SeedScore(f"b-s{k}", k, np.nan, np.nan, np.nan, np.nan) for k in range(3)]
    found = compare_by_method("loss", {"b": unknown}, {"b": broken}, share=False, baseline="base")
    assert found.text.count("not finite") == 7
    fewer = [ExampleScores(Ratio(np.ones(5), np.ones(5))) for _ in range(3)]
    assert rank_scores({"a": shares(0.5), "b": fewer})[1] == "no verdict: 200, 5 examples have this metric"
