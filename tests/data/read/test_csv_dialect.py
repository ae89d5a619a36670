"""Separators of csv files are found and reported, and a quote that does not close names its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitout.data.examples.examples import LabeledText
from kitout.data.read import tables
from kitout.data.read.csv_dialect import find_separator
from kitout.data.read.sources import load_examples
from kitout.data.read.tables import DataError
from kitout.data.streaming import open_stream

FOUND = {
    "text,label\na;b,1\n": ",",
    "text;label\na, b;1\n": ";",
    "text\tlabel\na, b\t1\n": "\t",
    "text|label\n": "|",
    "text\na;b\n": ",",
    "text,label\na\n": ",",  # nothing else fits either
    "text;label\n\n\"a;\nb\";1\n": ";",
}  # fmt: skip


@pytest.mark.parametrize(("content", "separator"), FOUND.items())
def test_the_separator_is_found_by_the_head(tmp_path: Path, content: str, separator: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text(content)
    assert find_separator(file) == separator


def test_another_separator_and_decimal_commas_are_read_and_reported(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text;label\ngood, very;3,5\nbad;-1,25\n")
    loaded = load_examples(file)
    assert loaded.splits[""] == (LabeledText("good, very", "3.5"), LabeledText("bad", "-1.25"))
    assert [str(reading) for reading in loaded.readings] == [
        "label (text, label, numbers with a decimal comma); fields separated by ';'"
    ]
    stream = open_stream(file, buffer=1)[""]
    assert tuple(stream) == loaded.splits[""]
    assert str(stream.readings[0]) == str(loaded.readings[0])
    (tmp_path / "y.csv").write_text("text,label\ngood,a\n")
    assert str(load_examples(tmp_path / "y.csv").readings[0]) == "label (text, label)"


UNCLOSED = {
    "at the end": ('text,label\na,1\nb,2\n"c,3\nd,4\ne,5\n', 4),
    "closed by a later one": ('text,label\na,1\n"b,2\nc,3\n"d",4\n', 3),
    "after a field of two lines": ('text,label\n"a\nb",1\n"c,2\n', 4),
    "in the first row": ('text,label\n"a,1\nb,2\n', 2),
}


@pytest.mark.parametrize(("content", "line"), UNCLOSED.values(), ids=UNCLOSED)
def test_a_quote_that_does_not_close_names_the_line_where_its_row_begins(
    tmp_path: Path, content: str, line: int
) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(DataError, match=rf"x\.csv line {line}: not a readable table .* begins with a quote"):
        load_examples(tmp_path / "x.csv")


def test_a_quote_that_takes_in_more_than_a_field_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_CHARS", 20)
    (tmp_path / "x.csv").write_text('text,label\na,1\n"b,2\n' + "c,3\n" * 20)
    with pytest.raises(DataError, match=r"x\.csv lines 3 to 8: a field of more than 20 .* begins with a quote"):
        load_examples(tmp_path / "x.csv")
