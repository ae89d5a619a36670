"""Lengths, labels and learnt tokens are counted over everything; spans are exact to the token."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kitout.data.encode.item import IGNORED, Item
from kitout.data.read.tables import DataError
from kitout.data.statistics import facts, rendered


def item(masked: int, learnt: int, **more: object) -> Item:
    ids = tuple(range(masked + learnt))
    return Item(ids, (IGNORED,) * masked + ids[masked:], **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One token a byte: borders may lie inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def test_counts() -> None:
    found = facts(
        {"train": [item(8, 2), item(5, 5), item(30, 10)], "validation": [item(1, 9, place="b:3")], "test": []}
    )
    train = found["train"]
    assert [part.name for part in found.parts] == ["train", "validation"]
    assert (train.examples, train.tokens, train.learned) == (3, 60, 17)
    assert train.percent == pytest.approx(100 * 17 / 60)
    assert found.percent == pytest.approx(100 * 26 / 70)
    assert train.quantiles == (10, 10, 10, 40, 40, 40)
    assert train.longest == 40
    assert found["validation"].longest_place == "b:3"
    assert found.warnings == ()


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [3, 4000], list(range(1, 200)), [10**6, 10**6 + 1]])
def test_bins_hold_every_length_once(lengths: list[int]) -> None:
    train = facts({"train": [Item((), target=tuple([1] * n)) if n < 10**5 else item(1, 5) for n in lengths]}).train
    assert sum(count for *_, count in train.bins) == len(lengths)
    assert len(train.bins) <= 12
    ends = [(low, high) for low, high, _ in train.bins]
    assert all(after[0] == before[1] + 1 for before, after in pairwise(ends))
    assert ends[0][0] <= train.quantiles[0] <= train.longest <= ends[-1][1]


def test_a_target_is_learnt_whole() -> None:
    found = facts({"train": [Item((1, 2, 3), target=(4, 5))]})
    assert (found.train.tokens, found.train.learned) == (5, 2)


def test_classes_several_classes_and_tokens_are_counted_by_label() -> None:
    one = facts({"train": [Item((1, 2), value=0), Item((1,), value=2), Item((1,), value=2)]}, ["a", "b", "c"])
    assert one.train.labels == {"a": 1, "b": 0, "c": 2}
    assert one.percent is None
    assert "no example of 'b'" in one.warnings[0]
    several = facts({"train": [Item((1,), value=(1.0, 0.0)), Item((1,), value=(1.0, 1.0))]}, ["a", "b"])
    assert several.train.labels == {"a": 2, "b": 1}
    tokens = facts({"train": [Item((5, 6, 7), labels=(0, IGNORED, 1)), Item((5, 6), labels=(0, 0))]}, ["O", "PER"])
    assert tokens.train.labels == {"O": 3, "PER": 1}
    assert tokens.warnings == ()


def test_numbers_are_summed_up() -> None:
    assert facts({"train": [Item((1,), value=v) for v in (0.5, 1.0, 3.0)]}).train.values == (0.5, 1.5, 3.0)


def test_one_class_alone_is_told() -> None:
    assert any("nothing to tell apart" in w for w in facts({"train": [Item((1,), value=0)]}, ["a", "b"]).warnings)


def test_nothing_learnt_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"0 % learnt.*data\.learn=all"):
        facts({"train": [item(10, 0), item(5, 0)]})
    with pytest.raises(DataError, match=r"truncation took the answer of 2 of 2.*data\.max_length"):
        facts({"train": [item(10, 0, cut=7, lost=3), item(5, 0, cut=1, lost=1)]})
    with pytest.raises(DataError, match="validation"):
        facts({"train": [item(1, 1)], "validation": [item(3, 0)]})
    with pytest.raises(DataError, match="no examples"):
        facts({"train": []})


def test_little_and_much_are_warnings() -> None:
    assert "only 1 %" in facts({"train": [item(99, 1)]}).warnings[0]
    assert "100 %" in facts({"train": [item(0, 10)]}).warnings[0]
    assert "1 of 2 examples hold nothing" in facts({"train": [item(5, 0), item(5, 5)]}).warnings[0]


def test_truncation_is_told() -> None:
    found = facts({"train": [item(5, 5, cut=3), item(5, 5, cut=4, lost=2), item(5, 5), item(5, 5)]})
    assert (found.train.cut, found.train.cut_tokens, found.train.lost) == (2, 7, 1)
    assert "cuts the answer of 1 of 4" in found.warnings[0]
    assert "lose the front" in facts({"train": [item(5, 5, cut=3), item(5, 5)]}).warnings[0]


def test_spans_join_to_the_whole(letters: PreTrainedTokenizerFast) -> None:
    ids = tuple(letters("ask: yes, no!")["input_ids"])
    labels = tuple(i if 5 <= n < 8 or n == 12 else IGNORED for n, i in enumerate(ids))
    spans = rendered(Item(ids, labels), letters)
    assert spans == [("ask: ", False), ("yes", True), (", no", False), ("!", True)]


@pytest.mark.parametrize("border", range(1, 14))
def test_a_border_inside_a_character_loses_nothing(letters: PreTrainedTokenizerFast, border: int) -> None:
    text = "né 🦉 [red]\ufffd"
    ids = tuple(letters(text)["input_ids"])
    spans = rendered(Item(ids, (IGNORED,) * border + ids[border:]), letters)
    assert "".join(words for words, _ in spans) == text
    assert [learnt for _, learnt in spans] in ([False, True], [True])
    whole = text.encode()[:border].decode(errors="ignore")  # characters that are complete before the border
    assert spans[0][0] == whole if len(spans) > 1 else whole == ""


def test_what_is_read_and_what_is_written(letters: PreTrainedTokenizerFast) -> None:
    read, write = (tuple(letters(words)["input_ids"]) for words in ("long text", "short"))
    assert rendered(Item(read, target=write), letters) == [("long text", False), ("short", True)]
    assert rendered(Item(read, value=1), letters) == [("long text", False)]
    assert rendered(Item(()), letters) == []
