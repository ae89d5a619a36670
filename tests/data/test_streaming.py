"""Streams: every example once, in a seeded order, resumed exactly; and the same stream as a sequence of items."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kitout.data.encode.generation import CausalEncoder
from kitout.data.examples.examples import Example
from kitout.data.read.sources import load_examples
from kitout.data.read.tables import DataError
from kitout.data.streaming import BUFFERED_ITEMS, StreamedItems, encode_stream, open_stream


def write(path: Path, *texts: str, **columns: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts))
    return path


def texts(examples: Iterable[Example]) -> list[str]:
    return [example.source_text() for example in examples]


def test_a_stream_has_every_example_once_in_a_seeded_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(f"{i:03}" for i in range(100)))
    stream = open_stream(path, seed=3, buffer=20)[""]
    order = texts(stream)
    assert sorted(order) == [f"{i:03}" for i in range(100)] != order
    assert order == texts(stream)
    assert order != texts(open_stream(path, seed=4, buffer=20)[""])
    assert order != texts(stream.for_epoch(1))
    assert texts(stream.for_epoch(1)) == texts(open_stream(path, seed=3, buffer=20)[""].for_epoch(1))
    assert texts(open_stream(path, buffer=1)[""]) == sorted(order)


@pytest.mark.parametrize("count", [0, 1, 37, 99, 100, 101])
def test_a_stream_resumes_exactly(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "x.jsonl", *(f"{i:03}" for i in range(100)))
    whole = open_stream(path, buffer=20)[""]
    held_out = whole.take_unique(10)
    for stream in (whole, whole.excluding(held_out)):
        assert list(stream.skip(count)) == list(stream)[count:]
        assert list(stream.skip(count).skip(3)) == list(stream)[count + 3 :]


def test_held_out_examples_never_come_again(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "Same", "b", "same ", "c", "B", "d")
    stream = open_stream(path)[""]
    held_out = stream.take_unique(2)
    assert texts(held_out) == ["Same", "b"]
    rest = stream.excluding(held_out)
    assert sorted(texts(rest)) == ["c", "d"]
    assert texts(rest.take_unique(1)) == ["c"]
    assert texts(rest.take_unique(9)) == ["c", "d"]
    assert rest.take_unique(0) == []


def test_a_stream_reads_no_further_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\n" + "a,b\n" * 1000 + "a,b,c\n")
    it = iter(open_stream(path, buffer=10)[""])
    assert [next(it).source_text() for _ in range(900)] == ["a"] * 900
    with pytest.raises(DataError, match="line 1002: more fields"):
        list(it)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_streams_of_every_table_have_the_rows_that_load_has(tmp_path: Path, ending: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [f"t{i}" for i in range(30)]
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.table({"text": rows}), path)
    elif ending == "jsonl":
        write(path, *rows)
    else:
        path.write_text("\n".join(rows if ending == "txt" else ["text", *rows]))
    assert tuple(open_stream(path, buffer=1)[""]) == load_examples(path).splits[""]


def test_a_bad_row_of_a_stream_stops_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "a", "", "b", label=1)
    with pytest.raises(DataError, match=r"x.jsonl .read as label.: line 2: 'text' is empty"):
        list(open_stream(path)[""])
    (tmp_path / "x.json").write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match="cannot be streamed; write one object a line"):
        open_stream(tmp_path / "x.json")


@pytest.mark.parametrize("skip", [0, 1, 255, 700, 1300, 5000])
def test_items_of_a_stream_are_those_of_the_whole(tmp_path: Path, tokenizer: Callable[..., Any], skip: int) -> None:
    path = write(tmp_path / "x.jsonl", *(f"fox {i} " * (1 + i % 7) for i in range(600)))
    encode = CausalEncoder(tokenizer(), 16)
    stream = open_stream(path, buffer=100)[""]
    whole = encode(list(stream))
    assert list(encode_stream(stream, encode, skip)) == whole[skip:]


def test_splits_of_a_stream(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "a")
    write(tmp_path / "test.jsonl", "b")
    streams = open_stream(tmp_path)
    assert {split: texts(examples) for split, examples in streams.items()} == {"train": ["a"], "test": ["b"]}
    assert all(isinstance(e, Example) for e in streams["train"])


def test_streamed_items_are_those_of_one_epoch_after_the_other(
    tmp_path: Path, tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BUFFERED_ITEMS > 10
    monkeypatch.setattr("kitout.data.streaming.BUFFERED_ITEMS", 10)
    stream = open_stream(write(tmp_path / "x.jsonl", *(f"fox {i}" for i in range(30))), buffer=5)[""]
    encode = CausalEncoder(tokenizer(), 16)
    items = StreamedItems(stream, encode)
    expected = [item for epoch in range(3) for item in encode(list(stream.for_epoch(epoch)))]
    assert [items[i] for i in range(75)] == expected[:75]
    assert len(items) == 75
    assert items[70:72] == expected[70:72]
    assert items[3] == expected[3]  # no longer kept: the stream is read again
    assert len(items) == 4


def test_a_stream_without_trained_tokens_is_refused(tmp_path: Path) -> None:
    stream = open_stream(write(tmp_path / "x.jsonl", "a", "b"))[""]
    with pytest.raises(DataError, match="no tokens to train on"):
        StreamedItems(stream, lambda examples: [])[0]
