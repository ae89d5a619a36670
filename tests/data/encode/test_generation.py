"""Examples of models that write: completions, plain text, sources and targets, and what truncation takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kitout.data.encode.generation import CausalEncoder, Seq2SeqEncoder, truncate
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, digest
from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import Chat, Completion, LabeledText, TaggedWords, Text
from kitout.data.read.tables import DataError
from work import at_most

Make = Callable[..., Any]


def trained_tokens(item: EncodedExample) -> list[int]:
    return [label for label in item.labels if label != IGNORE_INDEX]


def test_a_completion_follows_its_prompt_unchanged_and_ends(tokenizer: Make) -> None:
    tok = tokenizer("chatml")  # its template is not used
    (item,) = CausalEncoder(tok, 64)([Completion("What is two?", " It is four.", location="x:1")])
    assert tok.decode(item.input_ids) == "<s>What is two? It is four.</s>"
    assert tok.decode(trained_tokens(item)) == " It is four.</s>"
    assert tok.decode(item.input_ids[: item.prompt_length]) == "<s>What is two?"
    assert (item.reference, item.location, item.num_truncated) == (" It is four.", "x:1", 0)
    assert trained_tokens(CausalEncoder(tok, 64, "all")([Completion("a", "b")])[0]) == [*tok("ab").input_ids[1:], 1]


def test_plain_text_is_trained_on_as_a_whole_and_ends_once(tokenizer: Make) -> None:
    tok = tokenizer()
    once, twice = CausalEncoder(tok, 64)([Text("two and two"), Text("two and two</s>")])
    assert tok.decode(once.input_ids) == tok.decode(twice.input_ids) == "<s>two and two</s>"
    assert trained_tokens(once) == list(once.input_ids[1:])
    assert (once.prompt_length, once.reference) == (0, "")


def test_a_long_text_is_cut_into_blocks_and_nothing_is_lost(tokenizer: Make) -> None:
    tok = tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (whole,) = CausalEncoder(tok, 10_000)([Text(text)])
    blocks = CausalEncoder(tok, 16)([Text(text)])
    assert all(block.input_ids[0] == tok.bos_token_id and len(block.input_ids) <= 16 for block in blocks)
    assert [t for block in blocks for t in block.input_ids[1:]] == list(whole.input_ids[1:])
    assert sum(block.num_targets for block in blocks) == whole.num_targets
    assert blocks[-1].labels[-1] == tok.eos_token_id
    assert not any(block.num_truncated for block in blocks)


def test_truncation_takes_the_front_of_the_prompt(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    example = one_turn_chat("fox " * 50 + "What is two and two?", "It is four.")
    (whole,) = CausalEncoder(tok, 1000)([example])
    (item,) = CausalEncoder(tok, 32)([example])
    assert len(item.input_ids) == 32
    assert item.input_ids[0] == whole.input_ids[0]
    assert item.input_ids[1:] == whole.input_ids[-31:]
    assert (item.num_truncated, item.num_truncated_targets) == (len(whole.input_ids) - 32, 0)
    assert tok.decode(item.input_ids[item.prompt_length :]) == "It is four.<|im_end|>"
    assert trained_tokens(item) == trained_tokens(whole)


def test_an_answer_that_is_too_long_alone_loses_its_end(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    example = one_turn_chat("What is it?", "fox " * 50)
    (whole,) = CausalEncoder(tok, 1000)([example])
    (item,) = CausalEncoder(tok, 32)([example])
    assert len(item.input_ids) == 32
    assert trained_tokens(item) == trained_tokens(whole)[:31]
    assert item.num_truncated_targets == whole.num_targets - 31
    assert item.num_truncated == len(whole.input_ids) - 32


def test_truncation_takes_what_is_not_trained_on_first() -> None:
    ids = tuple(range(10))
    labels = (IGNORE_INDEX, IGNORE_INDEX, 2, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 6, 7, IGNORE_INDEX, IGNORE_INDEX)
    item = EncodedExample(ids, labels, prompt_length=6)
    assert truncate(item, 10, 1) is item
    assert truncate(item, 8, 1) == replace(item, input_ids=ids[:8], labels=labels[:8], num_truncated=2)
    assert truncate(item, 6, 1).input_ids == (0, 3, 4, 5, 6, 7)
    assert truncate(item, 6, 1) == EncodedExample(
        (0, 3, 4, 5, 6, 7), (*[IGNORE_INDEX] * 4, 6, 7), prompt_length=4, num_truncated=4, num_truncated_targets=1
    )
    assert truncate(item, 2, 1) == EncodedExample(
        (0, 6), (IGNORE_INDEX, 6), prompt_length=1, num_truncated=8, num_truncated_targets=2
    )


def test_a_pad_token_that_is_the_end_token_changes_nothing(tokenizer: Make) -> None:
    """Encoded examples have no padding: the end token is trained on whatever else it is used for."""
    example = [one_turn_chat("a", "b"), Completion("a", "b"), Text("a")]
    same = CausalEncoder(tokenizer("llama2", pad_token="</s>"), 64)(example)
    other = CausalEncoder(tokenizer("llama2", pad_token="<pad>"), 64)(example)
    assert same == other
    assert all(item.labels[-1] == item.input_ids[-1] == 1 for item in same)


@pytest.mark.parametrize("example", [LabeledText("a", "x"), TaggedWords(("a",), ("O",))])
def test_labels_are_not_answers(tokenizer: Make, example: Any) -> None:
    with pytest.raises(DataError, match="give an instruction, or train a classifier"):
        CausalEncoder(tokenizer(), 64)([example])


def test_no_examples_no_items(tokenizer: Make) -> None:
    assert CausalEncoder(tokenizer(), 64)([]) == Seq2SeqEncoder(tokenizer(), 64)([]) == []


def test_a_limit_without_room_is_refused(tokenizer: Make) -> None:
    with pytest.raises(DataError, match="max_length is 4, expected at least 8"):
        CausalEncoder(tokenizer(), 4)


def test_each_of_many_short_chats_costs_the_same_and_little(tokenizer: Make) -> None:
    examples = [one_turn_chat(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(300)]
    encode = CausalEncoder(tokenizer("chatml"), 512)
    encode(examples[:2])  # templates are compiled once
    with at_most(1_000_000) as few:
        assert len(encode(examples[:100])) == 100
    with at_most(4 * few.lines):  # longer numbers are more tokens
        assert len(encode(examples)) == 300


def test_a_source_and_its_target_both_end(tokenizer: Make) -> None:
    tok = tokenizer()
    examples = [Completion("two and two", "four"), one_turn_chat("Q", "A", "S"), LabeledText("a", 3)]
    items = Seq2SeqEncoder(tok, 64)(examples)
    assert [tok.decode(i.input_ids) for i in items] == ["<s>two and two", "<s>S\nQ", "<s>a"]
    assert [tok.decode(i.target_ids) for i in items] == ["<s>four</s>", "<s>A</s>", "<s>3</s>"]
    assert [i.reference for i in items] == ["four", "A", "3"]


def test_an_end_token_in_a_target_is_not_trained_on_twice(tokenizer: Make) -> None:
    for kind in ("bytes", "suffixed"):
        (item,) = Seq2SeqEncoder(tokenizer(kind=kind), 64)([Completion("two", "four</s>")])
        assert item.target_ids == Seq2SeqEncoder(tokenizer(kind=kind), 64)([Completion("two", "four")])[0].target_ids
        assert item.reference == "four"
    (item,) = CausalEncoder(tokenizer(), 64)([Completion("two", "four</s>")])
    assert (trained_tokens(item).count(1), item.reference) == (1, "four")


def test_answers_with_unknown_characters_are_remarked_on(tokenizer: Make) -> None:
    tok = tokenizer(kind="plain")
    examples = [Completion("two", "{four}"), Completion("{two}", "four"), Completion("two", "four")]
    for encoder in (CausalEncoder(tok, 64), Seq2SeqEncoder(tok, 64)):
        remarks = [item.remarks for item in encoder(examples)]
        assert remarks[1:] == [(), ()]
        assert "the vocabulary lacks: <unk> is trained on in their place" in remarks[0][0]
    one_for_all = tokenizer(kind="plain", unk_token="</s>")  # as GPT-2 has it: the end of an answer is not unknown
    assert CausalEncoder(one_for_all, 64)([Completion("two", "four")])[0].remarks == ()


def test_sources_and_targets_are_truncated_at_their_ends(tokenizer: Make) -> None:
    tok = tokenizer()
    whole = Seq2SeqEncoder(tok, 1000)([Completion("fox " * 30, "dog " * 30)])[0]
    item = Seq2SeqEncoder(tok, 16, max_target_length=10)([Completion("fox " * 30, "dog " * 30)])[0]
    assert item.input_ids == whole.input_ids[:16]
    assert item.target_ids == whole.target_ids[:10]
    assert item.num_truncated_targets == len(whole.target_ids) - 10
    assert item.num_truncated == item.num_truncated_targets + len(whole.input_ids) - 16


def test_truncated_sources_keep_the_end_token(tokenizer: Make) -> None:
    tok = tokenizer(kind="suffixed")
    whole, cut = (Seq2SeqEncoder(tok, max_length)([Completion("fox " * 30, "dog")])[0] for max_length in (1000, 16))
    assert tok.decode(whole.input_ids).endswith("fox </s>")
    assert cut.input_ids == (*whole.input_ids[:15], tok.eos_token_id)
    assert (cut.num_truncated, cut.num_truncated_targets) == (len(whole.input_ids) - 16, 0)
    assert list(cut.target_ids) == tok("dog").input_ids
    assert cut.target_ids.count(tok.eos_token_id) == 1


def test_seq2seq_needs_answers_in_text(tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"x:1: it has no answer"):
        Seq2SeqEncoder(tokenizer(), 64)([Text("a", location="x:1")])
    with pytest.raises(DataError, match="token classification"):
        Seq2SeqEncoder(tokenizer(), 64)([TaggedWords(("a",), ("O",))])


def test_the_digest_is_of_values_and_order(tokenizer: Make) -> None:
    one, two = CausalEncoder(tokenizer(), 64)([Text("a"), Text("b")])
    assert digest([one, two]) == digest([replace(one, location="elsewhere:3"), two])
    assert len({digest([one, two]), digest([two, one]), digest([one]), digest([])}) == 4
    assert digest([one]) != digest([replace(one, reference="a")])
    assert digest([EncodedExample((1, 2), (1, 2))]) == digest([EncodedExample((1, 2), (1, 2))])


def test_kinds_may_be_mixed_and_keep_their_order(tokenizer: Make) -> None:
    examples = [Text("fox " * 40, location="1"), one_turn_chat("a", "b"), Completion("a", "b", location="3")]
    places = [item.location for item in CausalEncoder(tokenizer("chatml"), 16)(examples)]
    assert places[0] == "1"
    assert places[-2:] == ["", "3"]
    assert isinstance(examples[1], Chat)
