"""Examples of models that classify: closed label sets, pairs, numbers, several labels, tags on the right tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kitout.data.encode.classification import (
    MAX_LABELS,
    ClassEncoder,
    MultiLabelEncoder,
    RegressionEncoder,
    TokenClassEncoder,
    label_set,
)
from kitout.data.encode.item import IGNORE_INDEX
from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import LabeledText, TaggedWords, Text
from kitout.data.read.tables import DataError

Make = Callable[..., Any]


def test_the_set_is_sorted_and_numbers_count() -> None:
    assert label_set([LabeledText("a", x) for x in ("b", "a", "b")]) == ("a", "b")
    assert label_set([LabeledText("a", x) for x in (10, 2, -1)]) == ("-1", "2", "10")
    assert label_set([LabeledText("a", ("y", "x")), LabeledText("b", ())]) == ("x", "y")
    assert label_set([TaggedWords(("a", "b"), ("B-X", "O"))]) == ("O", "B-X")
    with pytest.raises(DataError, match="is it the right column"):
        label_set(LabeledText("a", i) for i in range(MAX_LABELS + 1))


def test_classes(tokenizer: Make) -> None:
    tok = tokenizer()
    items = ClassEncoder(tok, 64, ("neg", "pos"))(
        [LabeledText("a fox", "pos", location="x:1"), LabeledText("a", "neg", "b")]
    )
    assert [i.label for i in items] == [1, 0]
    assert [i.reference for i in items] == ["pos", "neg"]
    assert items[0].input_ids == tuple(tok("a fox").input_ids)
    assert items[1].input_ids == tuple(tok("a", "b").input_ids)
    assert (items[0].location, items[0].labels, items[0].num_targets) == ("x:1", (), 1)


def test_the_longer_of_two_texts_is_truncated_and_counted(tokenizer: Make) -> None:
    tok = tokenizer()
    example = LabeledText("fox " * 40, "a", "dog")
    whole = len(tok(example.text, "dog").input_ids)
    (item,) = ClassEncoder(tok, 32, ("a", "b"))([example])
    assert (len(item.input_ids), item.num_truncated, item.num_truncated_targets) == (32, whole - 32, 0)
    assert tok.decode(item.input_ids).endswith("dog")


def test_a_label_outside_the_set_is_an_error_with_its_line(tokenizer: Make) -> None:
    encode = ClassEncoder(tokenizer(), 64, ("negative", "positive"))
    examples = [
        LabeledText("a", "negative", location="x:1"),
        LabeledText("a", "postive", location="x:2"),
        LabeledText("a", 3, location="x:3"),
    ]
    with pytest.raises(DataError) as error:
        encode(examples)
    assert "x:2: label 'postive' is not in the set; did you mean 'positive'?" in str(error.value)
    assert "x:3: label '3' is not in the set; known: 'negative', 'positive'" in str(error.value)


def test_examples_without_a_label_or_with_several_are_refused(tokenizer: Make) -> None:
    encode = ClassEncoder(tokenizer(), 64, ("a", "b"))
    for example, message in ((Text("x"), "a text example has no label"), (LabeledText("x", ("a", "b")), "multilabel")):
        with pytest.raises(DataError, match=message):
            encode([example])
    with pytest.raises(DataError, match="a chat example has no label"):
        RegressionEncoder(tokenizer(), 64)([one_turn_chat("a", "b")])
    with pytest.raises(DataError, match="a text example has no tags"):
        TokenClassEncoder(tokenizer(), 64, ("O", "X"))([Text("x")])


def test_one_label_is_too_few(tokenizer: Make) -> None:
    for kind in (ClassEncoder, MultiLabelEncoder, TokenClassEncoder):
        with pytest.raises(DataError, match="at least two different ones"):
            kind(tokenizer(), 64, ("a",))


def test_several_labels_at_once(tokenizer: Make) -> None:
    encode = MultiLabelEncoder(tokenizer(), 64, ("x", "y", "z"))
    items = encode([LabeledText("a", ("z", "x")), LabeledText("a", ()), LabeledText("a", "y")])
    assert [i.label for i in items] == [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    with pytest.raises(DataError, match="label 'w' is not in the set"):
        encode([LabeledText("a", ("x", "w"))])


def test_numbers(tokenizer: Make) -> None:
    encode = RegressionEncoder(tokenizer(), 64)
    values = [i.label for i in encode([LabeledText("a", x) for x in (1, 2.5, "3e-1")])]
    assert values == [1.0, 2.5, 0.3]
    assert all(isinstance(value, float) for value in values)
    for label in ("good", "nan", float("inf"), ("1",)):
        with pytest.raises(DataError, match="is not a finite number"):
            encode([LabeledText("a", label)])


def test_a_words_first_token_carries_its_tag(tokenizer: Make) -> None:
    tok = tokenizer(kind="plain")
    example = TaggedWords(("The", "lazy", "zzzzz", "dog"), ("O", "B-X", "I-X", "O"))
    (item,) = TokenClassEncoder(tok, 64, ("O", "B-X", "I-X"))([example])
    encoding = tok(list(example.words), is_split_into_words=True)
    assert item.input_ids == tuple(encoding.input_ids)
    seen_words: set[int] = set()
    for word, label in zip(encoding.word_ids(), item.labels, strict=True):
        first = word is not None and word not in seen_words
        assert label == ((0, 1, 2, 0)[word] if first else IGNORE_INDEX)
        seen_words.add(word)
    assert item.num_targets == 4
    assert len(item.input_ids) > 4


def test_truncated_tags_are_counted(tokenizer: Make) -> None:
    tok = tokenizer(kind="plain")
    example = TaggedWords(("dog",) * 40, ("O",) * 40)
    whole = len(tok(list(example.words), is_split_into_words=True).input_ids)
    (item,) = TokenClassEncoder(tok, 16, ("O", "X"))([example])
    assert len(item.input_ids) == 16
    assert item.num_truncated == whole - 16
    assert item.num_targets + item.num_truncated_targets == 40
    assert TokenClassEncoder(tok, 16, ("O", "X"))([]) == []
