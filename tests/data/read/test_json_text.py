"""JSON that no parser or no later reader can hold: a DataError with its place, never Python's own error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kitout.data.read.json_text import MAX_DEPTH, parse_json
from kitout.data.read.sources import load_examples
from kitout.data.read.tables import DataError

DEEP = {levels: '{"a":' * levels + "1" + "}" * levels for levels in (MAX_DEPTH, MAX_DEPTH + 1, 900, 100_000)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP[MAX_DEPTH + 1], "nested more than 100 levels deep"),
        (DEEP[900], "nested more than 100 levels deep"),
        (DEEP[100_000], "nested more than 100 levels deep"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "more digits than any number"),
        ("-" + "9" * 5000, "more digits than any number"),
        ('{"a"\n}', "line 2: not JSON"),
        ("{'a': 1}", r"not JSON \(.*column 2\)"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_json(text)


def test_what_is_wide_or_just_deep_enough_is_read() -> None:
    assert parse_json(DEEP[MAX_DEPTH])
    assert parse_json(json.dumps([[]] * 1000)) == [[]] * 1000
    assert parse_json("1" * 4000) == int("1" * 4000)


CALL = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": %s}]}]}'
HOSTILE = [
    (f'{{"text": {DEEP[900]}, "label": "a"}}', "nested more than 100"),
    (f'{{"text": "a", "label": {"9" * 5000}}}', "more digits"),
    (CALL % json.dumps({"name": "f", "arguments": DEEP[900]}), "the arguments of f: nested more than 100"),
    (CALL % json.dumps({"name": "f", "arguments": "9" * 5000}), "the arguments of f: not JSON"),
    (json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": f"[{DEEP[900]}]"}), "tools: nested"),
    ('{"messages": [{"role": [], "content": "a"}]}', r"turn 1 is by \[\]"),
    ('{"messages": [{"role": {}, "content": "a"}]}', "turn 1 is by {}"),
    ('{"messages": [{"role": "assistant", "tool_calls": 5}]}', "'tool_calls' is 5, expected a list"),
    ('{"question": "Q", "choices": {"text": ["a", "b"], "label": 3}, "answer": "a"}', "names of the choices are 3"),
    ('{"question": "Q", "choices": {"text": ["a"], "label": ["A", "B"]}, "answer": "B"}', "names of the choices are"),
]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize(("row", "message"), HOSTILE)
def test_a_hostile_row_names_its_file(tmp_path: Path, row: str, message: str, ending: str) -> None:
    file = tmp_path / f"d.{ending}"
    file.write_text(row if ending == "jsonl" else f"[{row}]")
    with pytest.raises(DataError, match=message) as error:
        load_examples(file)
    assert f"d.{ending}" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".jsonl", "~no-such-user/x.jsonl", "a\0b.jsonl", "x" * 5000, "x#" + "9" * 5000]
)
def test_a_path_that_no_system_has(name: str) -> None:
    with pytest.raises(DataError) as error:
        load_examples(name)
    assert len(str(error.value)) < 6000
