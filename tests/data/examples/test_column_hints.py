"""The line for columns that are not recognized: it names what looks like text, and works when it is pasted."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from kitout.data.examples.formats import detect
from kitout.errors import DataError
from kitout.train.config import overrides

TICKETS = {"id": "x{i}", "created at": "2024-01-{i}", "ticket text": "parcel {i} never came", "topic": "{kind}"}
CASES: list[tuple[dict[str, str], dict[str, str]]] = [
    (TICKETS, {"text": "ticket text", "label": "topic"}),
    ({"topic": "{kind}", "Beschwerde": "das Paket {i} kam nie"}, {"text": "Beschwerde", "label": "topic"}),
    ({"Frage": "wie geht {i} das", "Antwort": "so geht {i} es gut"}, {"prompt": "Frage", "completion": "Antwort"}),
    ({"true": "das Paket {i} kam", "1": "{kind}"}, {"text": "true", "label": "1"}),
    ({"it's: a \"text\"": "das Paket {i} kam", "$HOME": "{kind}"}, {"text": "it's: a \"text\"", "label": "$HOME"}),
    ({"n": "{i}", "Absatz": "das Paket {i} kam"}, {"text": "Absatz"}),
]  # fmt: skip


def table(cells: dict[str, str]) -> list[tuple[int, dict[str, Any]]]:
    return [(i, {c: text.format(i=i, kind="ab"[i % 2]) for c, text in cells.items()}) for i in range(2, 30)]


@pytest.mark.parametrize(("cells", "expected"), CASES)
def test_the_pasted_line_reads_the_table(cells: dict[str, str], expected: dict[str, str]) -> None:
    rows = table(cells)
    with pytest.raises(DataError) as error:
        detect(rows, "x.csv")
    (line,) = [line for line in str(error.value).splitlines() if "data.train.columns." in line]
    config = overrides.build_config(None, ["model=m", ("data.train", "x.csv"), *shlex.split(line)])
    (source,) = config.data.train
    assert source.columns == expected
    assert detect(rows, "x.csv", source.format, source.columns).columns.items() >= expected.items()


def test_a_format_that_is_asked_for_has_its_roles() -> None:
    with pytest.raises(DataError, match=r"format=question data.train.columns.question=\S+ data.train.columns.answer="):
        detect(table({"Frage": "wie geht {i}", "Antwort": "so geht {i}"}), "x.csv", "question")
    with pytest.raises(DataError, match=r"choose one, e.g. data.train.format=instruction"):
        detect([(1, {"text": "a", "label": "b", "instruction": "c", "output": "d"})], "x.csv")
