"""What is counted of pairs, judged answers and prompts, and what is warned of or refused."""

from __future__ import annotations

import pytest

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedPair, EncodedPrompt, EncodedUnpaired
from kitout.data.read.tables import DataError
from kitout.data.statistics import compute_statistics


def row(prompt: int, answer: int, length: int = 3, location: str = "", num_truncated: int = 0) -> EncodedExample:
    """A prompt of three tokens and an answer, each known by its first token."""
    prompt_ids, answer_ids = (prompt, 1, 2), (answer, *range(100, 99 + length))
    return EncodedExample(
        prompt_ids + answer_ids, (IGNORE_INDEX,) * 3 + answer_ids, prompt_length=3, location=location,
        num_truncated=num_truncated, reference=str(answer),
    )  # fmt: skip


def pair(prompt: int, chosen: int, rejected: int, lengths: tuple[int, int] = (3, 3), **fields: str) -> EncodedPair:
    return EncodedPair(row(prompt, chosen, lengths[0], **fields), row(prompt, rejected, lengths[1], **fields))


def test_lengths_are_counted_over_rows_and_answers_apart() -> None:
    pairs = [pair(i, 10, 20, (2, 5) if i % 2 else (7, 1)) for i in range(10)]
    cut = EncodedPair(row(50, 1, num_truncated=4), row(50, 2, num_truncated=4))
    statistics = compute_statistics({"train": [*pairs, cut]}, num_dropped={"train": 3})
    train = statistics.train
    assert (train.num_examples, train.num_dropped, train.num_truncated, train.num_truncated_tokens) == (11, 3, 1, 8)
    assert train.num_tokens == sum(item.length for item in [*pairs, cut])
    assert train.num_targets == sum(item.num_targets for item in [*pairs, cut])
    assert (train.quantiles[0], train.max_length) == (4, 10)
    chosen, rejected = statistics.answers
    assert [chosen.name, rejected.name] == ["chosen", "rejected"]
    assert (chosen.num_answers, chosen.median, chosen.max_length) == (11, 3, 7)
    assert (rejected.median, rejected.max_length) == (3, 5)
    assert [bins[:2] for bins in chosen.histogram] == [bins[:2] for bins in rejected.histogram]
    assert sum(count for *_, count in chosen.histogram) == sum(count for *_, count in rejected.histogram) == 11
    assert statistics.warnings == ()


def test_answers_whose_length_gives_them_away() -> None:
    def warnings(num_longer: int) -> tuple[str, ...]:
        pairs = [pair(i, 10, 20, (4, 3) if i < num_longer else (3, 3)) for i in range(100)]
        return compute_statistics({"train": pairs}).warnings

    assert warnings(90) == ()
    (warning,) = warnings(91)
    assert "the chosen answer is longer than the rejected one in 91 % of the pairs" in warning


def test_pairs_that_come_twice_or_both_ways_round() -> None:
    pairs = [pair(1, 10, 20, location="x:1"), pair(2, 10, 20), pair(1, 20, 10, location="x:3"), pair(3, 1, 2)]
    (warning,) = compute_statistics({"train": pairs}).warnings
    assert "1 of 4 pairs come both ways round" in warning
    assert warning.endswith("(the first: x:1 and x:3)")
    (warning,) = compute_statistics({"train": [*pairs[:2], pair(1, 10, 20)]}).warnings
    assert "1 of 3 pairs come more than once" in warning


def test_a_prompt_in_two_splits() -> None:
    train, test = [pair(i, 10, 20) for i in range(4)], [pair(3, 11, 21), pair(9, 10, 20)]
    (warning,) = compute_statistics({"train": train, "test": test}).warnings
    assert warning.startswith("test: 1 of 2 examples have a prompt whose tokens are in train too")
    prompts = [EncodedPrompt((1, 2, 3), "a"), EncodedPrompt((4, 5), "b")]
    (warning,) = compute_statistics({"train": prompts, "validation": prompts[:1]}).warnings
    assert warning.startswith("validation: 1 of 1")


def test_judged_answers_need_both_labels() -> None:
    answers = [EncodedUnpaired(row(i, 10), i % 4 == 0) for i in range(8)]
    statistics = compute_statistics({"train": answers, "test": answers[1:2]})
    assert statistics.train.label_counts == {"desirable": 2, "undesirable": 6}
    assert [(of_name.name, of_name.num_answers) for of_name in statistics.answers] == [
        ("desirable", 2), ("undesirable", 6)
    ]  # fmt: skip
    for is_desirable, name in ((True, "desirable"), (False, "undesirable")):
        with pytest.raises(DataError, match=f"train: all 3 answers are {name}: what is wanted is learned from both"):
            compute_statistics({"train": [EncodedUnpaired(row(i, 10), is_desirable) for i in range(3)]})


def test_an_answer_with_both_labels() -> None:
    answers = [EncodedUnpaired(row(1, 10), True), EncodedUnpaired(row(1, 10), False), EncodedUnpaired(row(2, 3), True),
               EncodedUnpaired(row(2, 4), False)]  # fmt: skip
    (warning,) = compute_statistics({"train": answers}).warnings
    assert warning == "train: 1 of 4 answers have both labels"


def test_prompts_have_tokens_and_nothing_trained_yet() -> None:
    prompts = [EncodedPrompt((1,) * n, "a", num_truncated=n == 5) for n in (2, 3, 5)]
    statistics = compute_statistics({"train": prompts})
    train = statistics.train
    assert (train.num_tokens, train.num_targets, train.trained_percent, train.num_truncated) == (10, 0, None, 1)
    assert (statistics.trained_percent, statistics.answers) == (None, ())
    assert compute_statistics({"train": prompts[:2]}).warnings == ()
