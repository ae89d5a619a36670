"""What a change from the base is called: lost, gained, kept or not distinguishable; Holm over an adapter's sets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kitout.evaluate.compare import compare
from kitout.evaluate.metrics.measure import Measure, proportion
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.metrics.texts import TextSums
from kitout.evaluate.sets.forgetting import (
    SetChange,
    forgetting_line,
    forgetting_rows,
    forgetting_table,
    forgetting_to_dict,
    set_changes,
)
from kitout.evaluate.significance.many import holm


def answers(right: int, n: int, wrong_of_right: int = 0, right_of_wrong: int = 0) -> tuple[Measure, Measure]:
    """Base and adapter: so many are right, of which the adapter loses some, and some others that it gains."""
    base = np.arange(n) < right
    tuned = base.copy()
    tuned[:wrong_of_right] = False
    tuned[n - right_of_wrong :] = True
    return proportion(base), proportion(tuned)


def changes_of(**pairs: tuple[Measure, Measure]) -> tuple[SetChange, ...]:
    base = {name: {"acc": pair[0]} for name, pair in pairs.items()}
    tuned = {name: {"acc": pair[1]} for name, pair in pairs.items()}
    return set_changes(base, tuned, {name: compare(base[name], tuned[name]).changes for name in pairs})


def test_a_set_is_called_by_its_change() -> None:
    found = changes_of(
        lost=answers(150, 200, wrong_of_right=40),
        gained=answers(50, 200, right_of_wrong=40),
        kept=answers(1500, 3000, 3, 3),
        unclear=answers(100, 200, 5, 4),
    )
    verdicts = {one.name: one.verdict for one in found}
    assert verdicts == {"lost": "lost", "gained": "gained", "kept": "kept", "unclear": "not distinguishable"}
    assert forgetting_line(found) == "lost on lost; gained on gained; kept on kept; not distinguishable on unclear"
    assert forgetting_line(()) == ""


def test_nothing_changed_is_kept_only_where_the_set_is_large_enough_to_say_so() -> None:
    for n, verdict in ((4, "not distinguishable"), (150, "not distinguishable"), (200, "kept"), (1000, "kept")):
        (found,) = changes_of(s=answers(n // 2, n))  # whose interval has no width, at one half
        assert (found.verdict, found.p_value) == (verdict, 1.0), n


def test_many_sets_are_corrected_together() -> None:
    pairs = {f"s{i}": answers(100, 200, 7, 0) for i in range(2)} | {"flat": answers(100, 200)}
    found = changes_of(**pairs)
    assert [one.adjusted for one in found] == holm([one.p_value for one in found])
    assert found[0].p_value == pytest.approx(2 * 0.5**7)
    (alone,) = changes_of(s0=answers(100, 200, 7, 0))
    assert alone.verdict == "lost"  # p 0.016
    assert changes_of(**{f"s{i}": answers(100, 200, 7, 0) for i in range(4)})[0].verdict != "lost"


def test_a_set_without_numbers_does_not_hide_what_others_lost() -> None:
    pair = [compute_measures("text", [TextSums(nll, 4, 9)] * 20) for nll in (5.0, float("nan"))]
    bits = tuple(one["bits_per_byte"] for one in pair)
    found = changes_of(wiki=(bits[0], bits[1]), piqa=answers(150, 200, wrong_of_right=60))
    assert {one.name: (one.verdict, one.p_value < 0.05) for one in found} == {
        "wiki": ("not finite", False), "piqa": ("lost", True)
    }  # fmt: skip
    assert forgetting_line(found) == "lost on piqa; not finite on wiki"


def test_bits_per_byte_are_lost_when_they_rise_and_come_with_their_divergence() -> None:
    rng = np.random.default_rng(0)
    nll = 100 + rng.normal(size=200)
    texts = lambda extra, kl: [TextSums(v + extra, 40, 80, kl) for v in nll]  # noqa: E731
    base = {"wiki": compute_measures("text", texts(0.0, 0.0))}
    for extra, verdict in ((5.0, "lost"), (-5.0, "gained"), (0.0, "kept")):
        tuned = {"wiki": compute_measures("text", texts(extra, 8.0))}
        changes = {"wiki": compare(base["wiki"], tuned["wiki"]).changes}
        (found,) = set_changes(base, tuned, changes)
        assert (found.verdict, found.divergence) == (verdict, pytest.approx(0.2))
        assert found.change.name == "bits_per_byte"


def test_it_is_shown_as_a_table_and_as_plain_values() -> None:
    found = changes_of(obqa=answers(150, 200, wrong_of_right=40))
    head, row = forgetting_rows(found)
    assert len(head) == len(row)
    assert row[0] == "obqa (200)"
    assert row[4].startswith("-20.0 (")
    assert forgetting_table(found).splitlines()[-1] == "lost on obqa"
    plain = json.loads(json.dumps(forgetting_to_dict(found)))
    assert plain["summary"] == "lost on obqa"
    assert plain["sets"]["obqa"]["difference"] == pytest.approx(-0.2)
    assert plain["sets"]["obqa"]["low"] < -0.2 < plain["sets"]["obqa"]["high"] < 0
