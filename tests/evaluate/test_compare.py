"""The verdict says what the interval allows; examples are selected by a rule; models share the same resamples."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from kitout.evaluate.compare import ComparedExample, compare, format_value, pick_examples
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import compute_measures


def correctness(base: list[int], tuned: list[int]) -> tuple[dict[str, Measure], dict[str, Measure]]:
    """Correct (1) or incorrect (0) by example, as classes that are all 1."""
    return compute_measures("classification", base, [1] * len(base)), compute_measures(
        "classification", tuned, [1] * len(tuned)
    )


def test_a_clear_gain_is_in_points_with_its_interval() -> None:
    base, tuned = correctness([1] * 264 + [0] * 336, [1] * 240 + [0] * 24 + [1] * 183 + [0] * 153)
    comparison = compare(base, tuned)
    first = comparison.changes[0]
    assert (first.name, first.title, first.is_better) == ("accuracy", "accuracy", True)
    assert first.difference == pytest.approx(0.265)
    assert 0.2 < first.low < 0.265 < first.high < 0.33
    low, high = f"{100 * first.low:.1f}", f"{100 * first.high:.1f}"
    assert first.verdict == f"better by 26.5 points ({low} to {high}); 600 test examples"
    assert comparison.verdict == f"accuracy: {first.verdict}"
    worse = compare(tuned, base).changes[0]
    assert (worse.is_better, worse.verdict) == (
        False, f"worse by 26.5 points ({low} to {high}); 600 test examples"
    )  # fmt: skip


def test_what_few_examples_cannot_show_is_not_significant() -> None:
    base, tuned = correctness([1, 0, 0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1, 1, 0, 0, 1])
    change = compare(base, tuned).changes[0]
    assert change.is_better is None
    assert change.verdict.startswith("no significant difference (-")
    assert change.verdict.endswith(" points); 10 test examples")
    one = compare(*correctness([0], [1])).changes[0]
    assert one.verdict.endswith(" points); 1 test example")
    same = compare(*correctness([1, 0] * 50, [1, 0] * 50)).changes
    assert all(change.is_better is None for change in same)


def test_a_lower_loss_is_better_and_has_no_points() -> None:
    rng = np.random.default_rng(0)
    base = [LossSums(float(loss), 10, 3) for loss in rng.normal(30, 2, 100)]
    tuned = [LossSums(one.loss - 10 + float(rng.normal(0, 0.5)), 10, 6) for one in base]
    loss, perplexity, token_accuracy = compare(
        compute_measures("language", base), compute_measures("language", tuned)
    ).changes
    assert (loss.is_better, perplexity.is_better, token_accuracy.is_better) == (True, True, True)
    assert loss.difference == pytest.approx(-1, abs=0.02)
    assert loss.verdict.startswith("better by 1")
    assert "points" not in loss.verdict
    assert "points" in token_accuracy.verdict
    # paired: the spread between examples, which both share, is not in the interval
    assert loss.high - loss.low < 0.4 * (loss.base.high - loss.base.low)
    back = compare(compute_measures("language", tuned), compute_measures("language", base)).changes[0]
    assert back.is_better is False


def test_only_common_metrics_are_compared() -> None:
    texts = ["yes", "no", "no"] * 4
    measures = compute_measures("generation", texts, texts)
    assert [c.name for c in compare(measures, measures).changes] == ["accuracy", "macro_f1", "exact_match", "token_f1"]
    assert [
        c.name for c in compare({"loss": measures["accuracy"], "accuracy": measures["accuracy"]}, measures).changes
    ] == ["accuracy"]
    with pytest.raises(ValueError, match="base has f1, fine-tuned accuracy"):
        compare({"f1": measures["accuracy"]}, {"accuracy": measures["accuracy"]})


def test_perplexity_beyond_float_range_still_compares() -> None:
    huge, small = [LossSums(1e6, 10, 0)] * 5, [LossSums(10.0, 10, 5)] * 5
    change = compare(compute_measures("language", huge), compute_measures("language", small)).changes[1]
    assert change.name == "perplexity"
    assert change.is_better is True
    assert change.verdict.startswith("better by 1.01e304 ")


REFERENCES = ["a", "a", "a", "b", "a", "c", "b", "c", "a"]
BASE = ["x", "a", "a", "b", "y", "c", "b", "q", "a"]
TUNED = ["a", "a", "x", "b", "z", "c", "a", "c", "a"]


def test_examples_are_the_first_of_each_label_and_the_first_that_changed() -> None:
    prompts = [f"prompt {i}" for i in range(9)]
    shown = pick_examples(prompts, REFERENCES, BASE, TUNED, 8)
    assert [s.prompt for s in shown] == [f"prompt {i}" for i in (0, 3, 5, 1, 2, 7, 6, 4)]
    assert [s.why for s in shown] == ["first of its label"] * 4 + ["the predictions differ"] * 4
    assert shown[0] == ComparedExample("prompt 0", "a", "x", "a", (False, True), "first of its label")
    assert shown[4].right == (True, False)  # what got worse is shown as well
    assert shown[7].right == (False, False)
    few = pick_examples(prompts, REFERENCES, BASE, TUNED, 3)
    assert [s.prompt for s in few] == ["prompt 0", "prompt 3", "prompt 2"]
    assert pick_examples(prompts, REFERENCES, BASE, TUNED, 0) == ()
    assert len(pick_examples(prompts, REFERENCES, BASE, BASE, 20)) == 9
    assert pick_examples([], [], [], [], 4) == ()
    stories = ["The whole story in a sentence.", "Another one of the same kind."]
    assert [s.right for s in pick_examples(["p", "q"], stories, stories, stories)] == [None, None]
    stories = ["The whole story in a sentence.", "Another one of the same kind."]
    assert [s.right for s in pick_examples(["p", "q"], stories, stories, stories)] == [None, None]
    labels = ["yes", "no"] * 6
    wordy = pick_examples(labels, labels, [f"I would say {label}." for label in labels], ["no"] * 12, 4)
    assert [s.right for s in wordy[:2]] == [(True, False), (True, True)]


@pytest.mark.parametrize(
    ("value", "share", "sign", "expected"),
    [(0.265, True, False, "26.5"), (0.265, True, True, "+26.5"), (-0.0001, True, True, "0.0"), (0.0, False, True, "0"),
     (-0.08183, False, True, "-0.08183"), (12345.6, False, False, "12,346"), (1e-9, False, False, "1e-9"),
     (float("-inf"), False, True, "-inf"), (float("inf"), False, True, "+inf"), (float("nan"), False, True, "nan")],
)  # fmt: skip
def test_format_value(value: float, share: bool, sign: bool, expected: str) -> None:
    assert format_value(value, share, sign) == expected


def test_what_the_examples_can_show_stands_with_the_verdict() -> None:
    base, tuned = correctness([1] * 264 + [0] * 336, [1] * 240 + [0] * 24 + [1] * 183 + [0] * 153)
    comparison = compare(base, tuned)
    smallest = comparison.changes[0].smallest
    assert smallest is not None
    assert smallest.value == pytest.approx(2.8016 * ((24 + 183) / 600 / 600) ** 0.5, rel=1e-4)
    assert comparison.smallest_text.startswith(
        "smallest difference that 600 test examples can show (80 % power): accuracy 6.7 points, macro-F1 "
    )
    values = asdict(comparison.changes[0])["smallest"]
    assert values == {"value": smallest.value, "n": 600, "share": True}


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), 1e300])
def test_a_loss_that_is_not_finite_has_no_verdict(loss: float) -> None:
    """A run that diverged: neither better nor worse, and no warning."""
    fine = [LossSums(10.0 + i % 5, 10, 3) for i in range(20)]
    broken = [*fine[:-1], LossSums(loss, 10, 3)]
    both = [compute_measures("language", one) for one in (fine, broken)]
    change, same = (compare(base, both[1]).changes[0] for base in both)
    assert change.verdict == "no verdict: a value is not finite; 20 test examples"
    assert (change.is_better, same.is_better) == (None, None)
