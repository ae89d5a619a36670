"""Lengths, labels and trained tokens are counted over everything; spans are exact to the token."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.read.tables import DataError
from kitout.data.statistics import compute_statistics, render_spans


def item(num_masked: int, num_trained: int, **fields: object) -> EncodedExample:
    ids = tuple(range(num_masked + num_trained))
    return EncodedExample(ids, (IGNORE_INDEX,) * num_masked + ids[num_masked:], **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One token a byte: borders may lie inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_counts() -> None:
    statistics = compute_statistics(
        {"train": [item(8, 2), item(5, 5), item(30, 10)], "validation": [item(1, 9, location="b:3")], "test": []}
    )
    train = statistics["train"]
    assert [split.name for split in statistics.splits] == ["train", "validation"]
    assert (train.num_examples, train.num_tokens, train.num_targets) == (3, 60, 17)
    assert train.trained_percent == pytest.approx(100 * 17 / 60)
    assert statistics.trained_percent == pytest.approx(100 * 26 / 70)
    assert train.quantiles == (10, 10, 10, 40, 40, 40)
    assert train.max_length == 40
    assert statistics["validation"].longest_location == "b:3"
    assert statistics.warnings == ()


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [3, 4000], list(range(1, 200)), [10**6, 10**6 + 1]])
def test_bins_hold_every_length_once(lengths: list[int]) -> None:
    train = compute_statistics(
        {"train": [EncodedExample((), target_ids=tuple([1] * n)) if n < 10**5 else item(1, 5) for n in lengths]}
    ).train
    assert sum(count for *_, count in train.histogram) == len(lengths)
    assert len(train.histogram) <= 12
    ends = [(low, high) for low, high, _ in train.histogram]
    assert all(after[0] == before[1] + 1 for before, after in pairwise(ends))
    assert ends[0][0] <= train.quantiles[0] <= train.max_length <= ends[-1][1]


def test_every_token_of_a_target_is_trained_on() -> None:
    statistics = compute_statistics({"train": [EncodedExample((1, 2, 3), target_ids=(4, 5))]})
    assert (statistics.train.num_tokens, statistics.train.num_targets) == (5, 2)


def test_classes_several_classes_and_tokens_are_counted_by_label() -> None:
    one = compute_statistics(
        {"train": [EncodedExample((1, 2), label=0), EncodedExample((1,), label=2), EncodedExample((1,), label=2)]},
        ["a", "b", "c"],
    )
    assert one.train.label_counts == {"a": 1, "b": 0, "c": 2}
    assert one.trained_percent is None
    assert "no example of 'b'" in one.warnings[0]
    several = compute_statistics(
        {"train": [EncodedExample((1,), label=(1.0, 0.0)), EncodedExample((1,), label=(1.0, 1.0))]}, ["a", "b"]
    )
    assert several.train.label_counts == {"a": 2, "b": 1}
    tokens = compute_statistics(
        {"train": [EncodedExample((5, 6, 7), labels=(0, IGNORE_INDEX, 1)), EncodedExample((5, 6), labels=(0, 0))]},
        ["O", "PER"],
    )
    assert tokens.train.label_counts == {"O": 3, "PER": 1}
    assert tokens.warnings == ()


def test_numbers_are_summed_up() -> None:
    assert compute_statistics(
        {"train": [EncodedExample((1,), label=v) for v in (0.5, 1.0, 3.0)]}
    ).train.value_range == (0.5, 1.5, 3.0)


def test_a_single_class_is_warned_of() -> None:
    assert any(
        "there is only one class" in w
        for w in compute_statistics({"train": [EncodedExample((1,), label=0)]}, ["a", "b"]).warnings
    )


@pytest.mark.parametrize(
    ("names", "counts", "message"),
    [
        (("Spam", "ham", "spam"), (3, 3, 3), "differ by case or white space alone are different classes: 'Spam' and"),
        (("a  b", "a b", "c"), (3, 3, 3), "'a  b' and 'a b'"),
        (("0", "1", "inf"), (3, 3, 3), "'inf' is a class of its own"),
        (("a", "b"), (5, 1), r"a label has one example \('b'\)"),
    ],
)
def test_suspicious_labels_are_warned_of(names: tuple[str, ...], counts: tuple[int, ...], message: str) -> None:
    items = [EncodedExample((1,), label=i) for i, count in enumerate(counts) for _ in range(count)]
    (warning,) = compute_statistics({"train": items}, names).warnings
    assert re.search(message, warning)


def test_remarks_are_counted_once_with_the_place_of_the_first() -> None:
    items = [item(8, 2), item(8, 2, remarks=("a word is lost",), location="x:2"), item(8, 2, remarks=("no", "no"))]
    assert compute_statistics({"train": items, "test": items[1:2]}).warnings == (
        "train: 1 of 3 examples: a word is lost (the first: x:2)",
        "train: 1 of 3 examples: no",
        "test: 1 of 1 examples: a word is lost (the first: x:2)",
    )


def test_no_trained_tokens_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"0 % trained tokens.*data\.train_on=all"):
        compute_statistics({"train": [item(10, 0), item(5, 0)]})
    with pytest.raises(DataError, match=r"truncation took the answer of 2 of 2.*data\.max_length"):
        compute_statistics(
            {
                "train": [
                    item(10, 0, num_truncated=7, num_truncated_targets=3),
                    item(5, 0, num_truncated=1, num_truncated_targets=1),
                ]
            }
        )
    with pytest.raises(DataError, match="validation"):
        compute_statistics({"train": [item(1, 1)], "validation": [item(3, 0)]})
    with pytest.raises(DataError, match="no examples"):
        compute_statistics({"train": []})


def test_little_and_much_are_warnings() -> None:
    assert "only 1 %" in compute_statistics({"train": [item(99, 1)]}).warnings[0]
    assert "100 %" in compute_statistics({"train": [item(0, 10)]}).warnings[0]
    assert (
        "1 of 2 examples have no trained tokens" in compute_statistics({"train": [item(5, 0), item(5, 5)]}).warnings[0]
    )


def test_truncation_is_warned_of() -> None:
    statistics = compute_statistics(
        {
            "train": [
                item(5, 5, num_truncated=3),
                item(5, 5, num_truncated=4, num_truncated_targets=2),
                item(5, 5),
                item(5, 5),
            ]
        }
    )
    assert (
        statistics.train.num_truncated,
        statistics.train.num_truncated_tokens,
        statistics.train.num_truncated_targets,
    ) == (2, 7, 1)
    assert "cuts the answer of 1 of 4" in statistics.warnings[0]
    assert (
        "cuts the start of the context of 1 of 2"
        in compute_statistics({"train": [item(5, 5, num_truncated=3), item(5, 5)]}).warnings[0]
    )


def test_spans_join_to_the_whole(letters: PreTrainedTokenizerFast) -> None:
    ids = tuple(letters("ask: yes, no!")["input_ids"])
    labels = tuple(i if 5 <= n < 8 or n == 12 else IGNORE_INDEX for n, i in enumerate(ids))
    spans = render_spans(EncodedExample(ids, labels), letters)
    assert spans == [("ask: ", False), ("yes", True), (", no", False), ("!", True)]


@pytest.mark.parametrize("border", range(1, 14))
def test_a_border_inside_a_character_loses_nothing(letters: PreTrainedTokenizerFast, border: int) -> None:
    text = "né 🦉 [red]\ufffd"
    ids = tuple(letters(text)["input_ids"])
    spans = render_spans(EncodedExample(ids, (IGNORE_INDEX,) * border + ids[border:]), letters)
    assert "".join(part for part, _ in spans) == text
    assert [is_trained for _, is_trained in spans] in ([False, True], [True])
    whole = text.encode()[:border].decode(errors="ignore")  # characters that are complete before the border
    assert spans[0][0] == whole if len(spans) > 1 else whole == ""


def test_what_is_read_and_what_is_written(letters: PreTrainedTokenizerFast) -> None:
    read, write = (tuple(letters(text)["input_ids"]) for text in ("long text", "short"))
    assert render_spans(EncodedExample(read, target_ids=write), letters) == [("long text", False), ("short", True)]
    assert render_spans(EncodedExample(read, label=1), letters) == [("long text", False)]
    assert render_spans(EncodedExample(()), letters) == []
