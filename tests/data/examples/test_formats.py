"""Every format is detected by its columns, its rows are read as meant, and every error names its line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kitout.data.examples.examples import Chat, Completion, Example, LabeledImage, LabeledText, TaggedWords, Text
from kitout.data.examples.format_table import FORMATS
from kitout.data.examples.formats import HEAD_ROWS, detect, to_examples
from kitout.data.read.tables import DataError


def read(*rows: dict[str, Any], **options: Any) -> list[Example]:
    return to_examples(list(enumerate(rows, start=1)), "x.jsonl", **options)


def read_one(row: dict[str, Any], **options: Any) -> Any:
    (example,) = read(row, **options)
    return example


def messages_of(example: Chat) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in example.turns]


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
CHATS = [
    ({"instruction": "Add", "input": "1 1", "output": "2"}, [("user", "Add\n\n1 1"), ("assistant", "2")]),
    ({"instruction": "Add", "input": "", "output": 2}, [("user", "Add"), ("assistant", "2")]),
    (
        {"instruction": "Say", "context": "x", "response": "y", "category": "z"},
        [("user", "Say\n\nx"), ("assistant", "y")],
    ),
    ({"prompt": "Hi", "response": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
    ({"input": "Hi", "target": "Ho"}, [("user", "Hi"), ("assistant", "Ho")]),
    (
        {"system": "Be kind", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        [("system", "Be kind"), ("user", "Hi"), ("assistant", "Ho")],
    ),
    (
        {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": PARTS}]},
        [("system", "x"), ("user", "ab")],
    ),
    ({"messages": '[{"role": "user", "content": "Hi"}]', "prompt": "Hi"}, [("user", "Hi")]),
    (
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]},
        [("user", "Hi"), ("assistant", "Ho")],
    ),
    ({"question": "Is it?", "passage": "It is.", "answer": True}, [("user", "It is.\n\nIs it?"), ("assistant", "yes")]),
    ({"Question": "How many?", "Body": "Two.", "Answer": 2.0}, [("user", "Two.\n\nHow many?"), ("assistant", "2")]),
    (
        {"title": "T", "context": "C", "question": "Q", "answers": {"text": ["A", "B"], "answer_start": [0, 1]}},
        [("user", "C\n\nQ"), ("assistant", "A")],
    ),
    ({"question": "Q", "choices": ["a", "b"], "answer": 1}, [("user", "Q\nA. a\nB. b"), ("assistant", "b")]),
    (
        {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": "2"},
        [("user", "Q\n1. a\n2. b"), ("assistant", "b")],
    ),
    ({"document": "D", "summary": "S", "id": 1}, [("user", "D\n\nSummarise this text."), ("assistant", "S")]),
    (
        {"question": "Q", "context": "C", "answers": {"text": [], "answer_start": []}},
        [("user", "C\n\nQ"), ("assistant", "unanswerable")],
    ),
    ({"question": "Q", "choices": '["a", "b"]', "answer": "1"}, [("user", "Q\nA. a\nB. b"), ("assistant", "b")]),
    (
        {"question": "Q", "choices": '{"text": ["a", "b"], "label": ["A", "B"]}', "answer": "B"},
        [("user", "Q\nA. a\nB. b"), ("assistant", "b")],
    ),
    ({"instruction": "Go on", "output": "    y = 1\n"}, [("user", "Go on"), ("assistant", "    y = 1")]),
    ({"question": "Q", "answer": "\tx"}, [("user", "Q"), ("assistant", "\tx")]),
    ({"document": "D", "summary": " S"}, [("user", "D\n\nSummarise this text."), ("assistant", " S")]),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "ai", "value": "Ho"}]},
        [("user", "Hi"), ("assistant", "Ho")],
    ),
    (
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]},
        [("system", ""), ("user", "Hi")],
    ),
    (
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}], "system": "Be kind"},
        [("system", "Be kind"), ("user", "Hi")],
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}]}]},
        [("user", "a")],
    ),
    ({"article": "D", "highlights": "S"}, [("user", "D\n\nSummarise this text."), ("assistant", "S")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), CHATS)
def test_chats_of_every_shape(row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert messages_of(read_one(row)) == turns


OTHERS = [
    ({"prompt": "a ", "completion": " b\n"}, Completion("a ", " b\n")),
    ({"text": " as it is \n", "url": "u", "language_score": 0.9}, Text(" as it is \n")),
    ({"text": "a", "label": "x"}, LabeledText("a", "x")),
    ({"tweet": "a", "sentiment": 2}, LabeledText("a", 2)),
    ({"text": "a", "label": True}, LabeledText("a", "true")),
    ({"text": "a", "labels": ["y", "x", "y"]}, LabeledText("a", ("x", "y"))),
    ({"text": "a", "labels": []}, LabeledText("a", ())),
    ({"text": "a", "labels": '["x"]'}, LabeledText("a", ("x",))),
    ({"sentence1": "a", "sentence2": "b", "label": 0.5, "idx": 3}, LabeledText("a", 0.5, "b")),
    ({"premise": "a", "hypothesis": "b", "label": 1}, LabeledText("a", 1, "b")),
    ({"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}, TaggedWords(("a", "b"), ("O", "B-X"))),
    ({"words": ["a"], "tags": [3]}, TaggedWords(("a",), ("3",))),
    (
        {"text": "New York, today.", "entities": [{"start": 0, "end": 8, "label": "LOC"}]},
        TaggedWords(("New", "York", ",", "today", "."), ("B-LOC", "I-LOC", "O", "O", "O")),
    ),
]


@pytest.mark.parametrize(("row", "example"), OTHERS)
def test_other_kinds_of_examples(row: dict[str, Any], example: Example) -> None:
    actual = read_one(row)
    assert actual == example
    assert actual.location == "x.jsonl:1"


def test_tools_and_calls_come_as_templates_take_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "content": "1", "tool_call_id": "1"}, {"role": "assistant", "content": "b"}],
         "tools": json.dumps(tools)},
        {"messages": [{"from": "human", "value": "a"},
                      {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                      {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}],
         "tools": tools},
    ]  # fmt: skip
    for example in read(*rows):
        assert isinstance(example, Chat)
        assert example.tools == tuple(tools)
        assert [t.role for t in example.turns] == ["user", "assistant", "tool", "assistant"]
        (tool_call,) = example.turns[1].message["tool_calls"]
        assert tool_call["function"] == {"name": "f", "arguments": {"x": 1}}
        assert example.turns[1].message["content"] == ""


def test_keys_that_parquet_fills_with_nulls_are_absent_again() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1, "unit": None, "in": {"y": None, "z": [None, 2]}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {}, "unit": None}}}}]
    turns = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "tool_calls": [call]}]
    example = read_one({"messages": turns, "tools": tools})
    function = example.turns[1].message["tool_calls"][0]["function"]
    assert function["arguments"] == {"x": 1, "in": {"z": [None, 2]}}
    assert example.tools[0]["function"]["parameters"] == {"properties": {"x": {}}}
    call["function"]["arguments"] = '{"x": null}'  # written by hand, it is what the model should write
    example = read_one({"messages": turns})
    assert example.turns[1].message["tool_calls"][0]["function"]["arguments"] == {"x": None}


def test_tools_and_calls_in_every_shape() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tools in (tool, json.dumps(tool), [json.dumps(tool)], json.dumps([tool])):
        assert read_one({"messages": turns, "tools": tools}).tools == (tool,)
    assert read_one({"messages": turns, "tools": " "}).tools == ()
    named = [{"name": name, "arguments": {"x": 1}} for name in ("f", "g")]
    expected = [{"type": "function", "function": one} for one in named]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(named)}]
    assert read_one({"conversations": sharegpt}).turns[1].message["tool_calls"] == expected
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert read_one({"messages": [turns[0], legacy]}).turns[1].message["tool_calls"] == expected[:1]


def test_a_turn_with_reasoning_alone_is_a_turn() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        example = read_one({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", key: "b"}]})
        assert example.turns[1].message == {"role": "assistant", "content": "", key: "b"}


def test_what_is_assumed_of_a_row_is_remarked_on() -> None:
    question = {"question": "Q", "context": "C", "answers": {"text": []}}
    assert "no answer is in the passage" in read_one(question).remarks[0]
    examples = read({"text": "a", "label": "x "}, {"text": "b", "label": "x"})
    assert [e.answer_text() for e in examples] == ["x", "x"]
    assert [len(e.remarks) for e in examples] == [1, 0]
    assert read_one({"text": "a", "label": "x "}, system_prompt="Judge.").remarks == examples[0].remarks


def test_numbers_with_a_decimal_comma() -> None:
    rows = [(i, {"text": "a", "label": label}) for i, label in enumerate(("3,5", "-1.000,25", " 4", "1,000"))]
    reading = detect(rows, "x")
    assert [e.answer_text() for e in reading.to_examples(rows)] == ["3.5", "-1000.25", "4", "1.000"]
    assert str(reading) == "label (text, label, numbers with a decimal comma)"
    for labels in (("1,000", "2,000"), ("3,5", "much"), ("3.5", "4")):
        assert not detect([(1, {"text": "a", "label": label}) for label in labels], "x").has_decimal_commas


def test_flags_of_turns() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
             {"role": "assistant", "content": "b", "train": True}]  # fmt: skip
    example = read_one({"messages": turns})
    assert [t.train_on for t in example.turns] == [None, False, True]
    assert "weight" not in example.turns[1].message
    with pytest.raises(DataError, match=r"turn 1: 'weight' is 0.5, expected true or false"):
        read({"messages": [{"role": "user", "content": "a", "weight": 0.5}]})


def test_named_columns_and_formats() -> None:
    row = {"body": "a", "stars": 5, "prompt": "p", "completion": "c"}
    assert read_one(row) == Completion("p", "c")
    assert read_one(row, columns={"text": "body", "label": "stars"}) == LabeledText("a", 5)
    assert read_one(row, format="label", columns={"label": "stars"}) == LabeledText("a", 5)
    assert read_one(row, format="text", columns={"text": "body"}) == Text("a")
    assert read_one(row, format="auto") == read_one(row)
    reading = detect([(1, row)], "x", format="text", columns={"text": "body"})
    assert str(reading) == "text (text=body); not read: stars, prompt, completion"


def test_a_system_prompt_makes_labeled_texts_chats() -> None:
    row = {"text": "Nice", "label": "good"}
    turns = [("system", "Judge."), ("user", "Nice"), ("assistant", "good")]
    assert messages_of(read_one(row, system_prompt="Judge.")) == turns
    assert messages_of(read_one({"prompt": "a", "response": "b"}, system_prompt="Judge."))[0] == ("system", "Judge.")
    with pytest.raises(DataError, match="line 1: a system prompt goes with chats and labeled texts"):
        read({"text": "Nice"}, system_prompt="Judge.")


def test_the_first_usual_name_wins_over_the_order_of_columns() -> None:
    reading = detect([(1, {"Category": "x", "LABEL": "y", "file": "a"})], "x", format="image")
    assert reading.columns == {"image": "file", "label": "LABEL"}


def test_ambiguity_lists_the_readings() -> None:
    row = {"text": "a", "label": "b", "instruction": "c", "output": "d"}
    with pytest.raises(DataError, match=r"(?s)text, label, instruction, output.*read as instruction or as label"):
        read(row)
    assert read_one(row, format="label") == LabeledText("a", "b")


def test_no_match_lists_columns_formats_and_the_line_to_write() -> None:
    with pytest.raises(DataError) as error:
        read({"headline": "a", "kind": "b"})
    message = str(error.value)
    assert "x.jsonl has the columns: headline, kind" in message
    assert all(each.name in message for each in FORMATS.values() if not each.by_name_only)
    assert "data.train.columns.text=headline data.train.columns.label=kind" in message
    assert read_one({"headline": "a", "kind": "b"}, columns={"text": "headline", "label": "kind"}) == LabeledText(
        "a", "b"
    )


def test_plain_text_is_not_taken_where_another_column_may_hold_the_answer() -> None:
    with pytest.raises(DataError, match="do not fit any known format"):
        read({"text": "a", "translation": "b"})
    assert read_one({"text": "a", "translation": "b"}, format="text") == Text("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "alpacca"}, "there is no format 'alpacca'; known: 'instruction'"),
        ({"columns": {"text": "bdy"}}, "no column 'bdy' .requested as 'text'.; did you mean 'body'"),
        ({"columns": {"txt": "body"}}, "'txt' is not a column of any format; did you mean 'text'"),
        (
            {"format": "label"},
            r"(?s)do not fit the format label; .*label: text/sentence/.* and label/labels/class/\.\.\.; optional",
        ),
        ({"format": "text", "columns": {"label": "body"}}, "'label' is not a column of the format text"),
    ],
)
def test_unknown_formats_and_columns(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read({"body": "a", "kind": 1}, **options)


BAD_ROWS = [
    ({"instruction": "a", "output": " "}, "line 1: 'output' is ' ', expected text"),
    ({"prompt": "a", "completion": ""}, "'completion' is '', expected text"),
    ({"text": "a", "label": None}, "'label' is empty, expected a label"),
    ({"text": float("nan"), "label": 1}, "'text' is empty, expected text"),
    ({"text": "a", "labels": ["x", None]}, "expected a list of labels"),
    ({"text": "a", "labels": "['x', 'y']"}, "line 1: labels: not JSON"),
    ({"messages": []}, "'messages' is .., expected a list that is not empty"),
    ({"messages": ["a"]}, "turn 1 is 'a', expected an object"),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "turn 1 is by 'narrator'; known: 'system'"),
    ({"messages": [{"role": "user", "content": ""}]}, r"turn 1 \(user\) is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be trained on"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "turn 1 calls a tool without a name"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
        "turn 1, the arguments of f: not JSON",
    ),
    ({"messages": [{"role": "user", "content": "a"}], "tools": "[}"}, "tools: not JSON"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [1]}, "expected a list of JSON schemas"),
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, "'tokens' has an element that is not a word"),
    ({"question": "Q", "answers": {"text": []}}, "'answers' is empty"),
    ({"question": "Q", "choices": ["a"], "answer": 3}, "'answer' is 3, none of the 1 choices"),
    ({"text": "ab", "spans": [{"start": 0, "end": 9, "label": "X"}]}, "0 <= start < end <= 2"),
    (
        {"text": "a b", "spans": [{"start": 0, "end": 2, "label": "X"}, {"start": 1, "end": 3, "label": "Y"}]},
        "'X' and 'Y' overlap at character 1",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_errors_of_a_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(row)


def test_bad_rows_are_reported_together_and_counted() -> None:
    rows = [{"text": "a", "label": "x" if i % 2 else ""} for i in range(16)]
    with pytest.raises(DataError) as error:
        read(*rows)
    message = str(error.value)
    assert re.match(r"x\.jsonl \(read as label\): 8 errors\n", message)
    assert [f"line {n}:" in message for n in (1, 3, 5, 7, 9, 11)] == [True] * 5 + [False]
    assert "and 3 more such rows" in message


def test_a_later_column_is_read_and_in_a_stream_is_an_error() -> None:
    rows = [(i, {"instruction": "a", "output": "b"}) for i in range(1, HEAD_ROWS + 1)]
    late = (999, {"instruction": "a", "input": "c", "output": "b"})
    assert to_examples([*rows, late], "x")[-1].source_text() == "a\n\nc"
    with pytest.raises(DataError, match=r"line 999: it has the column 'input'"):
        detect(rows, "x").to_example(late)


def test_images_are_read_if_the_format_is_named() -> None:
    row = {"path": "a.png", "label": 3}
    (example,) = to_examples([(1, row)], "a table", format="image")
    assert example == LabeledImage("a.png", "3")
    assert (example.source_text(), example.answer_text()) == ("a.png", "3")
    with pytest.raises(DataError, match="do not fit any known format"):
        detect([(1, row)], "a table")
    assert detect([(1, row | {"text": "words"})], "a table").format.name == "label"


def test_a_message_shows_some_of_many_columns() -> None:
    with pytest.raises(DataError, match=r"c39, \.\.\. \(5,000 in all\)") as error:
        detect([(1, {f"c{i}": 1 for i in range(5000)})], "wide.csv")
    assert len(str(error.value)) < 3000


def test_data_of_another_stage_say_which() -> None:
    rows = [(f"line {i}", {"prompt": "a b", "completion": f"c {i}", "label": bool(i % 2)}) for i in range(4)]
    words = (
        r"fit texts to train on \(format completion\), which sft takes, or answers .*unpaired\), which kto takes; else"
    )
    with pytest.raises(DataError, match=words):
        detect(rows, "x.jsonl", kinds=("preference",))
    words = r"do not fit the format preference; they fit prompts \(format prompts\), which grpo takes"
    with pytest.raises(DataError, match=words):
        detect([("line 1", {"prompt": "a b", "n": 1})], "x.jsonl", kinds=("preference",))
