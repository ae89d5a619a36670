"""`data.group`: the column is read beside the format's own, changes nothing else, and its absence is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kitout.data.encode.generation import CausalEncoder
from kitout.data.encode.item import EncodedExample, digest
from kitout.data.examples.examples import LabeledText
from kitout.data.examples.formats import detect
from kitout.data.examples.row_groups import detect_grouped
from kitout.data.read.tables import DataError
from kitout.errors import BadRows
from tiny_models import tokenizer

TABLES = {
    "label": {"text": "good", "label": "a", "doc": 3},
    "question": {"question": "who?", "context": "a cat", "answer": "cat"},
    "text": {"text": "a cat", "chapter": "one"},
    "tokens": {"tokens": ["a", "cat"], "tags": ["O", "B-X"], "doc": "d"},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "by": "me"},
}
GROUPS = {"question": "context", "text": "chapter", "messages": "by"}


@pytest.mark.parametrize("name", TABLES)
def test_every_format_has_groups_and_is_read_as_without(name: str) -> None:
    rows, group = [(2, TABLES[name])], GROUPS.get(name, "doc")
    reading = detect_grouped(rows, "t", group)
    assert reading.format.name == name
    assert group not in reading.unused_columns
    assert f"in groups of one {group}" in str(reading)
    (example,) = reading.to_examples(rows)
    assert example.group == str(TABLES[name][group])
    if name != "text":  # which the column alone keeps from being recognized
        (plain,) = detect(rows, "t").to_examples(rows)
        assert plain == example
        assert (plain.exact_key, plain.input_key, plain.group) == (example.exact_key, example.input_key, "")


def test_a_column_that_is_not_there_is_said_with_those_that_are() -> None:
    with pytest.raises(DataError, match=r"t \(columns: text, label, doc\): there is no column 'docs'.*'doc'"):
        detect_grouped([(1, TABLES["label"])], "t", "docs")


@pytest.mark.parametrize("empty", [None, "", " ", float("nan")])
def test_a_row_without_a_group_is_a_bad_row(empty: object) -> None:
    rows = [(1, TABLES["label"]), (2, TABLES["label"] | {"doc": empty})]
    reading = detect_grouped(rows, "t", "doc")
    with pytest.raises(BadRows, match="line 2: 'doc' is empty"):
        reading.to_examples(rows)
    skipped: list[str] = []
    assert len(reading.to_examples(rows, skipped)) == len(skipped) == 1


def test_blocks_of_a_long_text_keep_its_group_and_digests_do_not_change() -> None:
    rows = [(i, {"text": "the cat is good today " * 8, "doc": i}) for i in (1, 2)]
    examples = detect_grouped(rows, "t", "doc").to_examples(rows)
    encode = CausalEncoder(tokenizer(), 16)
    items = encode(examples)
    assert len(items) > 4
    assert [item.group for item in items] == sorted(item.group for item in items)
    assert {item.group for item in items} == {"1", "2"}
    plain = encode([replace(example, group="") for example in examples])
    assert {item.group for item in plain} == {""}
    assert digest(items) == digest(plain)


def test_fingerprints_are_those_of_earlier_versions() -> None:
    whole = EncodedExample((1, 2), (-100, 2), prompt_length=1, reference="b", location="x:1", remarks=("r",), group="g")
    found = digest([whole, EncodedExample((3,), label=1)])
    assert found == "9e200f710e94299857b0e334e806fb51b94c34a61bbe6421139994869ae54568"
    example = LabeledText(text="a cat", label="b", location="x:1", group="g")
    assert example.exact_key == "12c1bb2dd84023c0eee037fb0cf98c39"
