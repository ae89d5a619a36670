"""Pairs, judged answers and prompts as tokens: the prompt alike, the answers whole, what does not fit counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kitout.data.encode.answers import PairEncoder, RolloutPromptEncoder, UnpairedEncoder, dropped_text
from kitout.data.encode.generation import CausalEncoder, encode_good
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedPair, digest
from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import Chat, Completion, Turn
from kitout.data.examples.formats import to_examples
from kitout.data.examples.preferences import PreferencePair, Prompt, UnpairedAnswer
from kitout.errors import BadRows, DataError
from kitout.train.objectives.answer_rows import collate_rows

Tokenizers = Callable[..., Any]
PROMPT = "What is the weather in Paris today, and in London? " * 3
LONG, SHORT = "It is sunny in Paris, and it rains in London today.", "No."
TEMPLATES = ["chatml", "llama2", "two_ends", "closes_last", "no_end", "generation", "parts", None]


def pair(prompt: str = PROMPT, chosen: str = LONG, rejected: str = SHORT, **fields: Any) -> PreferencePair:
    return PreferencePair(one_turn_chat(prompt, chosen), one_turn_chat(prompt, rejected), **fields)


def answer_ids(row: EncodedExample) -> list[int]:
    return [label for label in row.labels if label != IGNORE_INDEX]


def prompt_ids(row: EncodedExample) -> tuple[int, ...]:
    return row.input_ids[: row.prompt_length]


@pytest.mark.parametrize("template", TEMPLATES)
def test_both_answers_are_encoded_as_a_causal_model_trains_on_them(tokenizer: Tokenizers, template: str | None) -> None:
    fast = tokenizer(template)
    item: EncodedPair
    (item,) = PairEncoder(fast, 400)([pair(margin=2.0, location="x:1")])
    for row, text in zip(item.rows, (LONG, SHORT), strict=True):
        (alone,) = CausalEncoder(fast, 400, "last")([one_turn_chat(PROMPT, text)])
        assert replace(alone, location="x:1") == row
        assert prompt_ids(row) == prompt_ids(item.chosen)
        assert answer_ids(row) == list(row.input_ids[row.prompt_length :])
        assert fast.decode(answer_ids(row)).lstrip().startswith(text)
        assert len(answer_ids(row)) > len(fast(text, add_special_tokens=False)["input_ids"])  # the end token too
    assert (item.margin, item.location) == (2.0, "x:1")
    assert item.length == sum(len(row.input_ids) for row in item.rows)
    assert item.num_targets == sum(len(answer_ids(row)) for row in item.rows)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_the_beginning_of_its_answers(tokenizer: Tokenizers, template: str | None) -> None:
    fast = tokenizer(template)
    (item,) = PairEncoder(fast, 400)([pair()])
    (prompt,) = RolloutPromptEncoder(fast, 400, 20)([Prompt(Chat(one_turn_chat(PROMPT, "").turns[:-1]))])
    assert prompt.input_ids == prompt_ids(item.chosen)
    assert prompt.prompt == ({"role": "user", "content": PROMPT},)


def test_raw_texts_are_encoded_character_by_character(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    raw = PreferencePair(Completion("Is it ", "sunny"), Completion("Is it ", "raining"))
    (item,) = PairEncoder(fast, 50)([raw])
    assert fast.decode(item.chosen.input_ids) == "<s>Is it sunny</s>"
    (prompt,) = RolloutPromptEncoder(fast, 50, 5)([Prompt("Is it ", {"n": 1})])
    assert prompt.input_ids == prompt_ids(item.chosen)
    assert (prompt.prompt, prompt.row) == ("Is it ", {"n": 1})


@pytest.mark.parametrize("has_start_token", [True, False])
def test_without_a_prompt_the_first_token_is_no_target(tokenizer: Tokenizers, has_start_token: bool) -> None:
    fast = tokenizer("chatml")
    pairs, answers = PairEncoder(fast, 50), UnpairedEncoder(fast, 50)
    if not has_start_token:
        pairs.rows.causal.span_tokenizer.start_ids = answers.rows.causal.span_tokenizer.start_ids = ()
    (item,) = pairs([PreferencePair(Completion("", "sunny"), Completion("", "raining"))])
    (judged,) = answers([UnpairedAnswer(Completion("", "sunny"), is_desirable=True)])
    assert judged.answer == item.chosen
    for row in item.rows:  # as many targets as a model has predictions of them
        assert len(collate_rows([row], torch.device("cpu")).targets["labels"]) == row.num_targets == len(row.labels) - 1


def test_truncation_takes_the_same_front_of_the_prompt_from_both_answers(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    (whole,) = PairEncoder(fast, 400)([pair()])
    limit = whole.chosen.length - 10
    assert whole.rejected.length < limit  # the shorter one would fit
    encoder = PairEncoder(fast, limit)
    (cut,) = encoder([pair()])
    assert encoder.dropped == []
    assert cut.chosen.length == limit
    assert [row.num_truncated for row in cut.rows] == [10, 10]
    assert prompt_ids(cut.chosen) == prompt_ids(cut.rejected)
    assert prompt_ids(cut.chosen)[0] == prompt_ids(whole.chosen)[0]  # the start of a turn stays
    assert prompt_ids(cut.chosen)[1:] == prompt_ids(whole.chosen)[11:]
    assert [answer_ids(row) for row in cut.rows] == [answer_ids(row) for row in whole.rows]
    (answer,) = UnpairedEncoder(fast, limit)([UnpairedAnswer(pair().chosen, True)])
    assert answer.answer == cut.chosen
    assert answer.num_targets == cut.chosen.num_targets


def test_a_pair_fits_as_long_as_a_token_of_its_prompt_does(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    (whole,) = PairEncoder(fast, 400)([pair()])
    longest = len(answer_ids(whole.chosen))
    (item,) = PairEncoder(fast, longest + 1)([pair()])
    assert item.chosen.prompt_length == item.rejected.prompt_length == 1
    turned, answer = (
        pair(chosen=SHORT, rejected=LONG, location="x:7"),
        UnpairedAnswer(pair().chosen, True, location="x:7"),
    )
    cases: list[tuple[Any, Any]] = [
        (PairEncoder, pair(location="x:7")),
        (PairEncoder, turned),
        (UnpairedEncoder, answer),
    ]
    for encoder_class, example in cases:
        encoder = encoder_class(fast, longest)
        assert encoder([example]) == []
        (message,) = encoder.dropped
        assert message.startswith("x:7: its answer leaves no room for the prompt")
    assert dropped_text(["a", "b"], "pairs") == "2 pairs do not fit and are left out: a; b"


def test_answers_of_equal_tokens_are_bad_rows(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    examples = [pair(location="x:1"), pair(chosen="No.", rejected="No.</s>", location="x:2"), pair(location="x:3")]
    same = PreferencePair(Completion("a", "b"), Completion("a", "b</s>"), location="x:2")
    examples[1] = same
    with pytest.raises(BadRows, match="x:2: the chosen and the rejected answer have the same tokens") as error:
        PairEncoder(fast, 400)(examples)
    assert list(error.value.messages) == [1]
    skipped: list[str] = []
    encoder = PairEncoder(fast, 45)
    assert [item.location for item in encode_good(encoder, examples, skipped)] == ["x:1", "x:3"]
    assert len(skipped) == 1
    assert encoder.dropped == []


def test_other_examples_are_refused(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    chat = one_turn_chat("a", "b")
    for encode in (PairEncoder(fast, 40), UnpairedEncoder(fast, 40), RolloutPromptEncoder(fast, 40, 4)):
        with pytest.raises(BadRows, match="it is a Chat, expected"):
            encode([chat])
    for example in (pair(), UnpairedAnswer(chat, True), Prompt("a")):
        with pytest.raises(BadRows, match=f"a {type(example).__name__} is for alignment"):
            CausalEncoder(fast, 40)([example])


def test_an_answer_of_several_turns(tokenizer: Tokenizers) -> None:
    rows = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"},
            {"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "No"}]  # fmt: skip
    other = [rows[0], {"role": "assistant", "content": "What"}, *rows[2:]]
    (example,) = to_examples([(1, {"chosen": rows, "rejected": other})], "x")
    fast = tokenizer("chatml")
    (item,) = PairEncoder(fast, 400)([example])
    assert prompt_ids(item.chosen) == prompt_ids(item.rejected)
    assert fast.decode(prompt_ids(item.chosen)) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert fast.decode(answer_ids(item.chosen)) == "Hello there<|im_end|>No<|im_end|>"
    reasoned = [rows[0], {"role": "assistant", "content": "<think>a</think>b"}, *rows[2:]]
    (example,) = to_examples([(1, {"chosen": reasoned, "rejected": other})], "x")
    with pytest.raises(BadRows, match="keep its last turn alone"):
        PairEncoder(tokenizer("strips_reasoning"), 400)([example])


def test_prompts_leave_room_for_the_answer(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    example = Prompt(Chat((Turn({"role": "user", "content": PROMPT}),)), {"answer": 4}, is_text=True, location="x:3")
    (whole,) = RolloutPromptEncoder(fast, 400, 20)([example])
    assert (whole.prompt, whole.row, whole.length, whole.num_targets) == (
        PROMPT,
        {"answer": 4},
        len(whole.input_ids),
        0,
    )
    (cut,) = RolloutPromptEncoder(fast, 60, 20)([example])
    assert (len(cut.input_ids), cut.num_truncated) == (40, len(whole.input_ids) - 40)
    assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[-39:]
    dropping = RolloutPromptEncoder(fast, 60, 20, overlong="drop")
    assert dropping([example]) == []
    assert dropping.dropped == [f"x:3: its {whole.length} tokens leave no room for 20 new ones in 60"]
    with pytest.raises(DataError, match="max_length=20 leaves 4 tokens for a prompt beside max_new_tokens=16"):
        RolloutPromptEncoder(fast, 20, 16)


def test_the_digest_tells_items_apart(tokenizer: Tokenizers) -> None:
    fast = tokenizer("chatml")
    (item,) = PairEncoder(fast, 400)([pair()])
    (answer,) = UnpairedEncoder(fast, 400)([UnpairedAnswer(pair().chosen, True)])
    (prompt,) = RolloutPromptEncoder(fast, 400, 9)([Prompt("Is it", {"n": 1})])
    turned = replace(item, chosen=item.rejected, rejected=item.chosen)
    others: list[Any] = [item, turned, replace(item, margin=1.0), answer, replace(answer, is_desirable=False), prompt,
                         replace(prompt, row={"n": 2}), item.chosen]  # fmt: skip
    assert len({digest([one]) for one in others}) == len(others)
    assert digest([replace(item, chosen=replace(item.chosen, location="y:9"))]) == digest([item])
    plain = EncodedExample((1, 2), (IGNORE_INDEX, 2), reference="a")
    assert digest([plain]).startswith("5d1d548ba83aff4e896c60ce")  # as before these items
