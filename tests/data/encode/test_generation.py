"""Items of models that write: completions, plain text, sources and targets, and what truncation takes and leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kitout.data.encode.generation import Causal, Seq2Seq, shortened
from kitout.data.encode.item import IGNORED, Item, digest
from kitout.data.examples.convert import single
from kitout.data.examples.examples import Chat, Completion, Labelled, Tagged, Text
from kitout.data.read.tables import DataError

Make = Callable[..., Any]


def learnt(item: Item) -> list[int]:
    return [label for label in item.labels if label != IGNORED]


def test_a_completion_goes_on_as_it_stands_and_ends(tokenizer: Make) -> None:
    words = tokenizer("chatml")  # its template is not used
    (item,) = Causal(words, 64)([Completion("What is two?", " It is four.", place="x:1")])
    assert words.decode(item.ids) == "<s>What is two? It is four.</s>"
    assert words.decode(learnt(item)) == " It is four.</s>"
    assert words.decode(item.ids[: item.prompt]) == "<s>What is two?"
    assert (item.reference, item.place, item.cut) == (" It is four.", "x:1", 0)
    assert learnt(Causal(words, 64, "all")([Completion("a", "b")])[0]) == [*words("ab").input_ids[1:], 1]


def test_plain_text_is_learnt_whole_and_ends_once(tokenizer: Make) -> None:
    words = tokenizer()
    once, twice = Causal(words, 64)([Text("two and two"), Text("two and two</s>")])
    assert words.decode(once.ids) == words.decode(twice.ids) == "<s>two and two</s>"
    assert learnt(once) == list(once.ids[1:])
    assert (once.prompt, once.reference) == (0, "")


def test_a_long_text_is_cut_into_blocks_and_nothing_is_lost(tokenizer: Make) -> None:
    words = tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (whole,) = Causal(words, 10_000)([Text(text)])
    blocks = Causal(words, 16)([Text(text)])
    assert all(block.ids[0] == words.bos_token_id and len(block.ids) <= 16 for block in blocks)
    assert [t for block in blocks for t in block.ids[1:]] == list(whole.ids[1:])
    assert sum(block.learned for block in blocks) == whole.learned
    assert blocks[-1].labels[-1] == words.eos_token_id
    assert not any(block.cut for block in blocks)


def test_truncation_takes_the_front_of_the_question(tokenizer: Make) -> None:
    words = tokenizer("chatml")
    example = single("fox " * 50 + "What is two and two?", "It is four.")
    (whole,) = Causal(words, 1000)([example])
    (item,) = Causal(words, 32)([example])
    assert len(item.ids) == 32
    assert item.ids[0] == whole.ids[0]
    assert item.ids[1:] == whole.ids[-31:]
    assert (item.cut, item.lost) == (len(whole.ids) - 32, 0)
    assert words.decode(item.ids[item.prompt :]) == "It is four.<|im_end|>"
    assert learnt(item) == learnt(whole)


def test_an_answer_too_long_alone_loses_its_end(tokenizer: Make) -> None:
    words = tokenizer("chatml")
    example = single("What is it?", "fox " * 50)
    (whole,) = Causal(words, 1000)([example])
    (item,) = Causal(words, 32)([example])
    assert len(item.ids) == 32
    assert learnt(item) == learnt(whole)[:31]
    assert item.lost == whole.learned - 31
    assert item.cut == len(whole.ids) - 32


def test_shortening_takes_what_nobody_learns_first() -> None:
    ids = tuple(range(10))
    labels = (IGNORED, IGNORED, 2, IGNORED, IGNORED, IGNORED, 6, 7, IGNORED, IGNORED)
    item = Item(ids, labels, prompt=6)
    assert shortened(item, 10, 1) is item
    assert shortened(item, 8, 1) == replace(item, ids=ids[:8], labels=labels[:8], cut=2)
    assert shortened(item, 6, 1).ids == (0, 3, 4, 5, 6, 7)
    assert shortened(item, 6, 1) == Item((0, 3, 4, 5, 6, 7), (*[IGNORED] * 4, 6, 7), prompt=4, cut=4, lost=1)
    assert shortened(item, 2, 1) == Item((0, 6), (IGNORED, 6), prompt=1, cut=8, lost=2)


def test_a_pad_token_that_is_the_end_token_changes_nothing(tokenizer: Make) -> None:
    """Items hold no padding: the end token is learnt whatever else it is used for."""
    example = [single("a", "b"), Completion("a", "b"), Text("a")]
    same = Causal(tokenizer("llama2", pad_token="</s>"), 64)(example)
    other = Causal(tokenizer("llama2", pad_token="<pad>"), 64)(example)
    assert same == other
    assert all(item.labels[-1] == item.ids[-1] == 1 for item in same)


@pytest.mark.parametrize("example", [Labelled("a", "x"), Tagged(("a",), ("O",))])
def test_labels_are_no_answers(tokenizer: Make, example: Any) -> None:
    with pytest.raises(DataError, match="give an instruction, or train a classifier"):
        Causal(tokenizer(), 64)([example])


def test_no_examples_no_items(tokenizer: Make) -> None:
    assert Causal(tokenizer(), 64)([]) == Seq2Seq(tokenizer(), 64)([]) == []


def test_a_limit_without_room_is_refused(tokenizer: Make) -> None:
    with pytest.raises(DataError, match="max_length is 4, expected at least 8"):
        Causal(tokenizer(), 4)


def test_thousands_of_short_chats_take_seconds(tokenizer: Make) -> None:
    examples = [single(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(3000)]
    encode = Causal(tokenizer("chatml"), 512)
    start = time.process_time()
    assert len(encode(examples)) == 3000
    assert time.process_time() - start < 10  # well below one second where nothing else runs


def test_a_source_and_its_target_both_end(tokenizer: Make) -> None:
    words = tokenizer()
    examples = [Completion("two and two", "four"), single("Q", "A", "S"), Labelled("a", 3)]
    items = Seq2Seq(words, 64)(examples)
    assert [words.decode(i.ids) for i in items] == ["<s>two and two", "<s>S\nQ", "<s>a"]
    assert [words.decode(i.target) for i in items] == ["<s>four</s>", "<s>A</s>", "<s>3</s>"]
    assert [i.reference for i in items] == ["four", "A", "3"]


def test_sources_and_targets_are_cut_at_their_ends(tokenizer: Make) -> None:
    words = tokenizer()
    whole = Seq2Seq(words, 1000)([Completion("fox " * 30, "dog " * 30)])[0]
    item = Seq2Seq(words, 16, target_length=10)([Completion("fox " * 30, "dog " * 30)])[0]
    assert item.ids == whole.ids[:16]
    assert item.target == whole.target[:10]
    assert item.lost == len(whole.target) - 10
    assert item.cut == item.lost + len(whole.ids) - 16


def test_sources_end_as_the_tokenizer_ends_them_also_when_cut(tokenizer: Make) -> None:
    words = tokenizer(kind="suffixed")
    whole, cut = (Seq2Seq(words, most)([Completion("fox " * 30, "dog")])[0] for most in (1000, 16))
    assert words.decode(whole.ids).endswith("fox </s>")
    assert cut.ids == (*whole.ids[:15], words.eos_token_id)
    assert (cut.cut, cut.lost) == (len(whole.ids) - 16, 0)
    assert list(cut.target) == words("dog").input_ids
    assert cut.target.count(words.eos_token_id) == 1


def test_a_text_without_an_answer_is_no_pair(tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"x:1: there is nothing to be said"):
        Seq2Seq(tokenizer(), 64)([Text("a", place="x:1")])
    with pytest.raises(DataError, match="token classification"):
        Seq2Seq(tokenizer(), 64)([Tagged(("a",), ("O",))])


def test_the_digest_is_of_values_and_order(tokenizer: Make) -> None:
    one, two = Causal(tokenizer(), 64)([Text("a"), Text("b")])
    assert digest([one, two]) == digest([replace(one, place="elsewhere:3"), two])
    assert len({digest([one, two]), digest([two, one]), digest([one]), digest([])}) == 4
    assert digest([one]) != digest([replace(one, reference="a")])
    assert digest([Item((1, 2), (1, 2))]) == digest([Item((1, 2), (1, 2))])


def test_kinds_may_be_mixed_and_keep_their_order(tokenizer: Make) -> None:
    examples = [Text("fox " * 40, place="1"), single("a", "b"), Completion("a", "b", place="3")]
    places = [item.place for item in Causal(tokenizer("chatml"), 16)(examples)]
    assert places[0] == "1"
    assert places[-2:] == ["", "3"]
    assert isinstance(examples[1], Chat)
