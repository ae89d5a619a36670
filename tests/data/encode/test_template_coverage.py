"""What a chat template leaves out is refused or remarked on: every key, each call, each result under its own call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kitout.data.encode.generation import CausalEncoder, Seq2SeqEncoder
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.examples.examples import Chat
from kitout.data.examples.formats import to_examples
from kitout.data.read.tables import DataError

Make = Callable[..., Any]

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TOOLS_HEAD = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
CONTENT = "{{ m['content'] or '' }}"
REASONS = "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
NAMES = "{% if m['name'] %}{{ '[' + m['name'] + '] ' }}{% endif %}"
ALL_CALLS = "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"
FIRST_CALL = "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function'] | tojson }}{% endif %}"
CALL_NAMES = "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}"
CALL_NAMES_AND_ARGUMENTS = (
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] ~ c['function']['arguments'] }}{% endfor %}"
)
CALLS_OR_CONTENT = "{% if m['tool_calls'] %}" + ALL_CALLS + "{% else %}" + CONTENT + "{% endif %}"
# As gpt-oss has it: a result is written under the name of the newest call.
NEWEST_CALL = (
    "{% set ns = namespace(name='') %}{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
    "{% set ns.name = c['function']['name'] %}{% endfor %}"
    "{{ '<|im_start|>' + (ns.name if m['role'] == 'tool' else m['role']) + '\n' }}" + CONTENT + ALL_CALLS + TAIL
)
IDS = CONTENT + ALL_CALLS + "{{ m['tool_call_id'] or '' }}"


def body(*parts: str) -> str:
    return TOOLS_HEAD + HEAD + "".join(parts) + TAIL


def chat(*messages: dict[str, Any], **columns: Any) -> Chat:
    (example,) = to_examples([(1, {"messages": list(messages), **columns})], "x.jsonl")
    assert isinstance(example, Chat)
    return example


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": f"id-{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*names: str, **message: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(name, x=name) for name in names], **message}


def result(of: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": f"result of {of}", **keys}


USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "four"}


def encode(make: Make, template: str, *chats: Chat, **options: Any) -> tuple[list[EncodedExample], list[str]]:
    tok = make("chatml")
    tok.chat_template = template
    items = CausalEncoder(tok, 2000, **options)(list(chats))
    return items, [tok.decode(item.input_ids) for item in items]


def trained_text(make: Make, item: EncodedExample) -> str:
    return str(make("chatml").decode([label for label in item.labels if label != IGNORE_INDEX]))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_rendered_under_each_of_its_names_or_refused(tokenizer: Make, key: str) -> None:
    example = chat(USER, {**ANSWER, key: "two and two"})
    (item,), (text,) = encode(tokenizer, body(REASONS, CONTENT), example)
    assert "<think>two and two</think>four<|im_end|>" in text
    assert trained_text(tokenizer, item) == "<think>two and two</think>four<|im_end|>"
    with pytest.raises(DataError, match=rf"leaves out '{key}' of turn 2 \(assistant\), which would not be trained on"):
        encode(tokenizer, body(CONTENT), example)


def test_reasoning_alone_is_a_turn(tokenizer: Make) -> None:
    (item,), _ = encode(
        tokenizer, body(REASONS, CONTENT), chat(USER, {"role": "assistant", "content": None, "reasoning": "two"})
    )
    assert trained_text(tokenizer, item) == "<think>two</think><|im_end|>"


def test_the_switch_that_shows_reasoning_is_named(tokenizer: Make) -> None:
    switched = body("{% if enable_thinking %}" + REASONS + "{% endif %}", CONTENT)
    example = chat(USER, {**ANSWER, "reasoning": "two"})
    with pytest.raises(DataError, match=r"pass enable_thinking=True to it \(data\.chat_template_kwargs\)"):
        encode(tokenizer, switched, example)
    encode(tokenizer, switched, example, template_kwargs={"enable_thinking": True})


def test_other_keys_are_remarked_on_and_read_keys_are_not(tokenizer: Make) -> None:
    examples = [chat({**USER, "name": "Ada", "mood": {"calm": 1}}, ANSWER), chat({**USER, "name": ""}, ANSWER)]
    items, _ = encode(tokenizer, body(CONTENT), *examples)
    assert [item.remarks for item in items] == [
        ("the chat template leaves out 'name' of user turns", "the chat template leaves out 'mood' of user turns"),
        (),
    ]
    items, texts = encode(tokenizer, body(NAMES, CONTENT), examples[0])
    assert items[0].remarks == ("the chat template leaves out 'mood' of user turns",)
    assert "[Ada] hello" in texts[0]


def test_what_data_add_to_a_call_is_rendered_or_remarked_on(tokenizer: Make) -> None:
    noted = {**call("add", x=1), "note": "aloud"}
    noted["function"] = {**noted["function"], "strict": True}
    example = chat(USER, {"role": "assistant", "content": "", "tool_calls": [noted]})
    (item,), _ = encode(tokenizer, body(CONTENT, CALL_NAMES_AND_ARGUMENTS), example)
    assert item.remarks == (
        "the chat template leaves out 'note' of calls of assistant turns",
        "the chat template leaves out 'strict' of calls of assistant turns",
    )
    whole = body(CONTENT, "{% for c in m['tool_calls'] or [] %}{{ c | tojson }}{% endfor %}")
    (item,), (text,) = encode(tokenizer, whole, example)
    assert "aloud" in text
    assert not item.remarks
    plain = chat(USER, {"role": "assistant", "content": "", "tool_calls": [call("add", x=1)]})
    assert not encode(tokenizer, body(CONTENT, CALL_NAMES_AND_ARGUMENTS), plain)[0][0].remarks


def test_what_a_template_drops_of_earlier_answers_is_remarked_on_where_all_is_one_text(tokenizer: Make) -> None:
    last_only = body("{% if loop.last %}" + REASONS + "{% endif %}", CONTENT)
    reasoned = {**ANSWER, "reasoning": "two"}
    items, _ = encode(tokenizer, last_only, chat(USER, reasoned, USER, reasoned), train_on="all")
    assert "drops a part of earlier answers" in items[0].remarks[0]
    items, texts = encode(tokenizer, last_only, chat(USER, reasoned, USER, reasoned))
    assert [(text.count("<think>"), item.remarks) for item, text in zip(items, texts, strict=True)] == [(1, ())] * 2
    assert encode(tokenizer, last_only, chat(USER, reasoned), train_on="all")[0][0].remarks == ()


def test_media_are_refused_even_where_a_template_marks_them(tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"leaves out 'images' of turn 1 \(user\), and only text can be trained on"):
        encode(tokenizer, body(CONTENT), chat({**USER, "images": ["a.png"]}, ANSWER))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((CONTENT, FIRST_CALL), "leaves out call 2 of 2 of turn 2"),
        ((CONTENT, CALL_NAMES), "leaves out the arguments of call 1 of 2 of turn 2"),
        ((CALLS_OR_CONTENT,), "leaves out 'content' of turn 2"),
    ],
)
def test_each_of_several_calls_and_the_words_beside_them(tokenizer: Make, parts: tuple[str, ...], message: str) -> None:
    example = chat(USER, calls("add", "sum", content="let me see"))
    with pytest.raises(DataError, match=message):
        encode(tokenizer, body(*parts), example)
    (item,), _ = encode(tokenizer, body(CONTENT, ALL_CALLS), example)
    assert trained_text(tokenizer, item).count('"name"') == 2


def test_system_turns_in_the_middle(tokenizer: Make) -> None:
    first_only = "{% if m['role'] != 'system' or loop.first %}" + CONTENT + "{% endif %}"
    example = chat(USER, ANSWER, {"role": "system", "content": "be brief"}, USER, ANSWER)
    with pytest.raises(DataError, match=r"leaves out 'content' of turn 3 \(system\)"):
        encode(tokenizer, body(first_only), example)


def test_all_tools_are_listed(tokenizer: Make) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "sum")]
    one = HEAD + "{% if loop.first and tools %}{{ tools[0] | tojson }}{% endif %}" + CONTENT + TAIL
    with pytest.raises(DataError, match="lists fewer than the 2 tools"):
        encode(tokenizer, one, chat(USER, ANSWER, tools=tools))


def test_results_come_in_the_order_of_their_calls(tokenizer: Make) -> None:
    by_id = [result("sum", tool_call_id="id-sum"), result("add", tool_call_id="id-add")]
    by_name = [result("sum", name="sum"), result("add", name="add")]
    for results in (by_id, by_name):
        example = chat(USER, calls("add", "sum"), *results, ANSWER)
        _, (text,) = encode(tokenizer, body(CONTENT, ALL_CALLS), example)
        assert text.index("result of add") < text.index("result of sum")
    shown = chat(USER, calls("add", "sum"), *by_id, ANSWER)
    _, (text,) = encode(tokenizer, body(IDS), shown)  # each is marked, so the order is the data's
    assert text.index("result of sum") < text.index("result of add")
    with pytest.raises(DataError, match="the result of the call 'id-x', and no turn before it makes that call"):
        encode(tokenizer, body(CONTENT, ALL_CALLS), chat(USER, calls("add"), result("x", tool_call_id="id-x"), ANSWER))


def test_a_result_under_the_name_of_another_call_is_refused(tokenizer: Make) -> None:
    add, total = result("add", tool_call_id="id-add"), result("sum", tool_call_id="id-sum")
    example = chat(USER, calls("add"), calls("sum"), add, total, ANSWER)
    with pytest.raises(DataError, match=r"turn 4 is the result of the call of 'add', and .* files it under 'sum'"):
        encode(tokenizer, NEWEST_CALL, example)
    in_turn = chat(USER, calls("add"), add, calls("sum"), total, ANSWER)
    _, (text,) = encode(tokenizer, NEWEST_CALL, in_turn)
    assert "<|im_start|>sum\nresult of sum" in text


def test_white_space_that_a_template_trims_is_remarked_on(tokenizer: Make) -> None:
    example = chat(USER, {**ANSWER, "content": "    y = 1"})
    (item,), _ = encode(tokenizer, body("{{ m['content'] | trim }}"), example)
    assert item.remarks == ("the chat template leaves out the white space at the beginning of assistant turns",)
    (item,), _ = encode(tokenizer, body(CONTENT), example)
    assert (item.remarks, trained_text(tokenizer, item)) == ((), "    y = 1<|im_end|>")


def test_an_end_token_in_the_data_is_not_trained_on_twice(tokenizer: Make) -> None:
    for content in ("four<|im_end|>", "four<|im_end|>\n", "four<|im_end|><|im_end|>"):
        (item,), _ = encode(tokenizer, body(CONTENT), chat(USER, {**ANSWER, "content": content}))
        assert (trained_text(tokenizer, item), item.reference) == ("four<|im_end|>", "four")


def test_without_a_template_nothing_is_lost_in_silence_either(tokenizer: Make) -> None:
    for encoder in (CausalEncoder(tokenizer(), 64), Seq2SeqEncoder(tokenizer(), 64)):
        with pytest.raises(DataError, match=r"turn 2 \(assistant\) has 'reasoning', which has no place"):
            encoder([chat(USER, {**ANSWER, "reasoning": "two"})])
        (item,) = encoder([chat({**USER, "name": "Ada"}, ANSWER)])
        assert item.remarks == ("without a chat template 'name' of user turns is left out",)
    with pytest.raises(DataError, match="it has tools, which sequence-to-sequence models have no place for"):
        Seq2SeqEncoder(tokenizer(), 64)([chat(USER, ANSWER, tools=[{"function": {"name": "f"}}])])
