"""Masks, exactly: a chat is trained on what a model writes when it is prompted turn by turn, end tokens included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kitout.data.encode.assistant_spans import AssistantSpans
from kitout.data.encode.generation import CausalEncoder
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Chat, Turn
from kitout.data.read.tables import DataError

Make = Callable[..., Any]


def chat(*contents: str, system: str = "", flags: Sequence[bool | None] = ()) -> Chat:
    """User and assistant in turn."""
    turns = [Turn({"role": "system", "content": system})] if system else []
    roles = ("user", "assistant")
    for i, text in enumerate(contents):
        turns.append(Turn({"role": roles[i % 2], "content": text}, flags[i] if flags else None))
    return Chat(tuple(turns))


def trained_runs(tokenizer: Any, item: EncodedExample) -> list[str]:
    """Each run of trained tokens as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(item.input_ids, item.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        runs[-1].append(token) if label != IGNORE_INDEX else runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def prompt_ids(tokenizer: Any, example: Chat, k: int) -> list[int]:
    """The ids a served model gets before it writes turn k."""
    turns = [dict(t.message) for t in example.turns[:k]]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


ONE = chat("What is two and two?", "It is four.")
TWO = chat("Hello", "assistant", "What is it? It is four.", "It is four.", system="Answer yes or no.")

CLOSINGS = {
    "chatml": ("", "<|im_end|>"),
    "tools": ("", "<|im_end|>"),
    "llama2": (" ", " </s>"),
    "generation": ("", "<|im_end|>"),
    "strips_reasoning": ("", "<|im_end|>"),
    "parts": ("", "<|im_end|>"),
    "tags_more": ("", "<|im_end|>"),
    "tags_less": ("", "<|im_end|>"),
    "no_system": ("", "<|im_end|>"),
}


@pytest.mark.parametrize("template", CLOSINGS)
def test_every_assistant_turn_and_its_end_are_trained_on_and_nothing_else(tokenizer: Make, template: str) -> None:
    tok = tokenizer(template)
    (item,) = CausalEncoder(tok, 512)([TWO])
    before, end = CLOSINGS[template]
    assert trained_runs(tok, item) == [f"{before}assistant{end}", f"{before}It is four.{end}"]
    assert item.reference == "It is four."


@pytest.mark.parametrize("kind", ["bytes", "plain"])
@pytest.mark.parametrize(
    "template", ["chatml", "tools", "llama2", "generation", "strips_reasoning", "two_ends", "no_end"]
)
def test_the_prompt_is_what_a_served_model_is_given(tokenizer: Make, template: str, kind: str) -> None:
    tok = tokenizer(template, kind)
    for example in (ONE, TWO, chat("  \n", "\n\n  x"), chat("a\n", "\nb"), chat("é 漢字 🙂", "🙂🙂")):
        for item in CausalEncoder(tok, 512)([example])[-1:]:
            k = len(example.turns) - 1
            assert list(item.input_ids[: item.prompt_length]) == prompt_ids(tok, example, k)
            assert set(item.labels[: item.prompt_length]) <= {IGNORE_INDEX, *item.input_ids[: item.prompt_length]}
            assert item.labels[item.prompt_length] == item.input_ids[item.prompt_length]


def test_sentencepiece_keeps_its_tokens_whole(tokenizer: Make) -> None:
    tok = tokenizer("llama2", "sentencepiece")
    (item,) = CausalEncoder(tok, 512)([TWO])
    whole = tok.apply_chat_template([dict(t.message) for t in TWO.turns], return_dict=False)
    assert list(item.input_ids) == list(whole)
    assert [text.strip() for text in trained_runs(tok, item)] == ["assistant </s>", "It is four. </s>"]


def test_the_same_words_in_the_prompt_are_not_trained_on(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    prompt = "<|im_start|>assistant\nIt is four."
    (item,) = CausalEncoder(tok, 512)([chat(prompt, "It is four.")])
    assert trained_runs(tok, item) == ["It is four.<|im_end|>"]


def test_last_all_and_the_flags_of_turns(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    three = chat("a", "one", "b", "two", "c", "three")
    flagged = chat("a", "one", "b", "two", "c", "three", flags=[None, True, None, False, None, None])
    assert trained_runs(tok, CausalEncoder(tok, 512, "last")([three])[0]) == ["three<|im_end|>"]
    assert trained_runs(tok, CausalEncoder(tok, 512)([flagged])[0]) == ["one<|im_end|>", "three<|im_end|>"]
    assert trained_runs(tok, CausalEncoder(tok, 512, "last")([flagged])[0]) == ["one<|im_end|>", "three<|im_end|>"]
    whole = CausalEncoder(tok, 512, "all")([three])[0]
    assert whole.labels == whole.input_ids
    runs = trained_runs(tok, CausalEncoder(tok, 512, "all")([flagged])[0])
    assert len(runs) == 2
    assert runs[0].endswith("assistant\n")
    assert runs[1].startswith("\n<|im_start|>user\nc")


def test_a_greeting_may_come_first_if_it_is_flagged_as_not_trained_on(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    greeting = Turn({"role": "assistant", "content": "Hi"}, False)
    (item,) = CausalEncoder(tok, 512)([Chat((greeting, *ONE.turns))])
    assert trained_runs(tok, item) == ["It is four.<|im_end|>"]
    unflagged = Chat((Turn(greeting.message), *ONE.turns))
    assert (
        CausalEncoder(tok, 512, "all")([unflagged])[0].num_targets == len(item.input_ids) + 1
    )  # and the line after the last end


def test_what_follows_the_last_trained_turn_is_left_out(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    example = Chat((*ONE.turns, Turn({"role": "user", "content": "Thanks"})))
    assert CausalEncoder(tok, 512)([example])[0].input_ids == CausalEncoder(tok, 512)([ONE])[0].input_ids


def test_a_template_that_strips_reasoning_gives_one_example_for_each_reasoning_turn(tokenizer: Make) -> None:
    tok = tokenizer("strips_reasoning")
    example = chat("a", "<think>hm</think>one", "b", "two", "c", "<think>so</think>three")
    items = CausalEncoder(tok, 512)([example])
    assert [trained_runs(tok, item) for item in items] == [
        ["<think>hm</think>one<|im_end|>"],
        ["two<|im_end|>", "<think>so</think>three<|im_end|>"],
    ]
    assert [list(i.input_ids[: i.prompt_length]) for i in items] == [
        prompt_ids(tok, example, 1),
        prompt_ids(tok, example, 5),
    ]
    assert [i.reference for i in items] == ["<think>hm</think>one", "<think>so</think>three"]


def test_both_end_tokens_are_trained_on_if_a_template_has_two(tokenizer: Make) -> None:
    tok = tokenizer("two_ends")
    (item,) = CausalEncoder(tok, 512)([TWO])
    assert trained_runs(tok, item) == ["assistant<|end|>", "It is four.<|end|>\n</s>"]


@pytest.mark.parametrize("template", ["closes_last", "no_end"])
def test_every_trained_turn_ends_in_a_trained_end_token(tokenizer: Make, template: str) -> None:
    """If the template closes no earlier turn, each becomes an example that ends as a served answer would."""
    tok = tokenizer(template)
    items = CausalEncoder(tok, 512)([TWO])
    assert [trained_runs(tok, item) for item in items] == [[" assistant\n</s>"], [" It is four.\n</s>"]]
    assert all(item.labels[-1] == tok.eos_token_id for item in items)


def test_no_template_gives_lines_with_a_start_and_an_end(tokenizer: Make) -> None:
    tok = tokenizer()
    (item,) = CausalEncoder(tok, 512)([chat("What is it?", "four", system="Answer.")])
    assert tok.decode(item.input_ids) == "<s>Answer.\nWhat is it?\nfour</s>"
    assert trained_runs(tok, item) == ["four</s>"]
    with pytest.raises(DataError, match=r"no chat template.*system user assistant user assistant"):
        CausalEncoder(tok, 512)([TWO])


def test_a_template_brings_its_own_start_token_once(tokenizer: Make) -> None:
    tok = tokenizer("closes_last")
    (item,) = CausalEncoder(tok, 512)([ONE])
    assert list(item.input_ids).count(tok.bos_token_id) == 1


def test_a_template_without_an_assistant_is_refused(tokenizer: Make) -> None:
    with pytest.raises(DataError, match="leaves out what the role 'assistant' says"):
        CausalEncoder(tokenizer("no_assistant"), 512)
    with pytest.raises(DataError, match=r"refuses the role 'assistant'.*only users here"):
        CausalEncoder(tokenizer("refuses_assistant"), 512)


def test_a_generation_prompt_that_the_answered_turn_does_not_start_with_is_refused(tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"asks for turn 2 with .*<think>"):
        CausalEncoder(tokenizer("prompt_reasons"), 512)([ONE])


def test_the_switch_that_makes_a_template_consistent_is_named_and_passed_on(tokenizer: Make) -> None:
    tok = tokenizer("switch")
    with pytest.raises(DataError, match="pass enable_thinking=False to it, here and wherever"):
        CausalEncoder(tok, 512)([ONE])
    (item,) = CausalEncoder(tok, 512, template_kwargs={"enable_thinking": False})([ONE])
    assert trained_runs(tok, item) == ["It is four.<|im_end|>"]


def test_generation_tags_of_a_template_are_followed(tokenizer: Make) -> None:
    tok = tokenizer("tags_less")
    example = chat("a", "<think>hm</think>one")
    (item,) = CausalEncoder(tok, 512)([example])
    assert trained_runs(tok, item) == ["one<|im_end|>"]
    assert list(item.input_ids[: item.prompt_length]) == prompt_ids(tok, example, 1)


def test_a_system_turn_that_a_template_refuses_opens_the_user_turn(tokenizer: Make) -> None:
    tok = tokenizer("no_system")
    (item,) = CausalEncoder(tok, 512)([TWO])
    assert tok.decode(item.input_ids).startswith("<|im_start|>user\nAnswer yes or no.\n\nHello<|im_end|>")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
WITH_TOOLS = Chat(
    (
        Turn({"role": "user", "content": "Is it sunny in Paris?"}),
        Turn({"role": "assistant", "content": "", "tool_calls": [CALL]}),
        Turn({"role": "tool", "content": "sunny"}),
        Turn({"role": "assistant", "content": "Yes"}),
    ),
    ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},),
)


def test_tool_calls_are_trained_on_and_tool_results_are_not(tokenizer: Make) -> None:
    tok = tokenizer("tools")
    (item,) = CausalEncoder(tok, 512)([WITH_TOOLS])
    call, answer = trained_runs(tok, item)
    assert call.startswith("<tool_call>")
    assert call.endswith("</tool_call><|im_end|>")
    assert '"city": "Paris"' in call
    assert answer == "Yes<|im_end|>"
    assert '"parameters"' in tok.decode(item.input_ids[: item.prompt_length])


def test_tools_that_a_template_leaves_out_are_an_error(tokenizer: Make) -> None:
    with pytest.raises(DataError, match="has tools, which the template leaves out"):
        CausalEncoder(tokenizer("chatml"), 512)([WITH_TOOLS])
    with pytest.raises(DataError, match="calls tools, which the template leaves out"):
        CausalEncoder(tokenizer("chatml"), 512)([Chat(WITH_TOOLS.turns)])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Chat((Turn({"role": "user", "content": "a"}),)), "there is no assistant turn"),
        (Chat((Turn({"role": "assistant", "content": "a"}),)), "starts with an assistant turn"),
        (chat("a", "b", flags=[None, False]), "no assistant turn is to be trained on"),
        (chat("a", "b", flags=[True, None]), r"turn 1 \(user\) is flagged to be trained on"),
    ],
)
def test_chats_that_cannot_be_trained_on(tokenizer: Make, example: Chat, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CausalEncoder(tokenizer("chatml"), 512)([example])


def test_errors_of_many_chats_are_reported_together_with_their_locations(tokenizer: Make) -> None:
    bad = [Chat((Turn({"role": "user", "content": "a"}),), location=f"x.jsonl:{i}") for i in range(7)]
    with pytest.raises(DataError, match=r"(?s)7 errors.*x\.jsonl:0: there is no.*x\.jsonl:4.*and 2 more"):
        CausalEncoder(tokenizer("chatml"), 512)(bad)


def test_the_error_of_a_failing_template_is_passed_on(tokenizer: Make) -> None:
    twice = Chat((*ONE.turns[:1], *ONE.turns))
    with pytest.raises(DataError, match="the chat template fails: roles must alternate"):
        CausalEncoder(tokenizer("llama2"), 512)([twice])


def test_an_unknown_train_on_and_a_slow_tokenizer_are_refused(tokenizer: Make) -> None:
    with pytest.raises(DataError, match="'assistant', 'last', 'all'"):
        AssistantSpans(SpanTokenizer(tokenizer("chatml")), "user")

    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow is a slow tokenizer"):
        SpanTokenizer(Slow())


def test_no_end_token_is_refused_before_any_data(tokenizer: Make) -> None:
    tok = tokenizer("chatml", eos_token=None)
    with pytest.raises(DataError, match="no end-of-text token"):
        CausalEncoder(tok, 512)


def test_reasoning_that_the_prompt_opens_is_asked_for(tokenizer: Make) -> None:
    with pytest.raises(DataError, match="write the reasoning in front of each answer"):
        CausalEncoder(tokenizer("prompt_reasons"), 512)([ONE])


def test_what_the_encoder_sets_itself_cannot_be_set(tokenizer: Make) -> None:
    for name in ("add_generation_prompt", "tokenize", "tools", "chat_template"):
        with pytest.raises(DataError, match=f"chat_template_kwargs sets {name}"):
            CausalEncoder(tokenizer("chatml"), 512, template_kwargs={name: True})
