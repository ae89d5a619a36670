"""A few bad rows need not cost a run: data.bad_rows=skip leaves them out, counts them and names their lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout.data.read.sources import load_examples
from kitout.data.read.tables import StreamedMessages, read_rows
from kitout.data.streaming import open_stream
from kitout.errors import BadRows, DataError
from tiny_images import folder
from tiny_models import decoder, encoder, reviews, vision

pytest.importorskip("accelerate")

BAD = {3: "{", 9: '{"text": "", "label": "good"}', 17: '["a"]', 25: '{"text": "x", "label": null}'}
PLACES = ("d.jsonl line 3: not JSON", "d.jsonl line 9: 'text' is empty", "d.jsonl line 17: a JSON list",
          "d.jsonl line 25: 'label' is empty")  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [json.dumps(row) for row in reviews(40)]
    for line, text in BAD.items():
        lines[line - 1] = text
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    return tmp_path / "d.jsonl"


def run(model: Path, data: Any, out: Path, **more: Any) -> Any:
    settings = {"model": {"name": str(model), "dtype": "float32"}, "data": data, "output": {"folder": str(out)}}
    return kitout.train(settings | {"train": {"steps": 2, "batch_size": 4}} | more, log=lambda _: None)


def test_the_run_goes_on_and_says_what_is_left_out(tmp_path: Path, data: Path) -> None:
    model = encoder(tmp_path / "model")
    with pytest.raises(DataError, match=r"line 3(.|\n)*correct them, or leave them out: data\.bad_rows=skip"):
        run(model, str(data), tmp_path / "refused")
    run(model, {"train": str(data), "bad_rows": "skip"}, tmp_path / "out")
    (messages,) = json.loads((tmp_path / "out/results.json").read_text())["skipped"].values()
    pages = {name: " ".join((tmp_path / "out" / name).read_text().split()) for name in ("preflight.txt", "report.html")}
    for place in PLACES:
        assert sum(place in message for message in messages) == 1
        assert all(place.partition(":")[0] in page for page in pages.values())
    assert all("4 bad rows" in page for page in pages.values())


def test_examples_that_a_template_refuses_are_left_out_too(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b"}]}
            for i in range(30)]  # fmt: skip
    rows[4]["messages"].reverse()
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    run(decoder(tmp_path / "model"), {"train": str(tmp_path / "d.jsonl"), "bad_rows": "skip"}, out)
    assert "d.jsonl:5: it starts with an assistant turn" in " ".join((out / "preflight.txt").read_text().split())


def test_images_that_do_not_open(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    folder(tmp_path / "d", 8)
    broken = sorted((tmp_path / "d").rglob("*.png"))[1]
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.bad_rows=skip"):
        run(vision(tmp_path / "model"), str(tmp_path / "d"), tmp_path / "refused")
    run(tmp_path / "model", {"train": str(tmp_path / "d"), "bad_rows": "skip"}, tmp_path / "out")
    (messages,) = json.loads((tmp_path / "out/results.json").read_text())["skipped"].values()
    assert len(messages) == 1
    assert broken.name in messages[0]


def test_a_file_with_more_bad_rows_than_good_ones_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n' + "{\n" * 2)
    with pytest.raises(DataError, match=r"2 rows are bad and 1 are not, too many(.|\n)*line 2"):
        load_examples(tmp_path / "d.jsonl", skip_bad_rows=True)


def test_a_stream_leaves_the_same_rows_out_in_every_epoch(tmp_path: Path, data: Path) -> None:
    skipped = StreamedMessages()
    stream = open_stream(data, skipped=skipped, buffer=8)[""]
    assert len(list(stream)) == 36
    assert len(skipped) == 4
    assert [e.source_text() for e in stream.skip(20)] == [e.source_text() for e in stream][20:]
    with pytest.raises(DataError, match="line 3"):
        list(open_stream(data)[""])


@pytest.mark.parametrize("name", ["d.csv", "d.parquet"])
def test_rows_of_other_tables(tmp_path: Path, name: str) -> None:
    if name == "d.csv":
        (tmp_path / name).write_text("text,label\na,1\nb,2,3\nc,3\n")
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        raw = pyarrow.array([b"a", b"\xff\xfe", b"c"], pyarrow.binary())
        texts = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
        parquet.write_table(pyarrow.table({"text": texts, "label": ["1", "2", "3"]}), tmp_path / name)
    skipped: list[str] = []
    assert [row["text"] for _, row in read_rows(tmp_path / name, skipped)] == ["a", "c"]
    assert len(skipped) == 1
    place = "line 3" if name == "d.csv" else "row 2"
    assert skipped[0].startswith(f"{name} {place}: ")
    with pytest.raises(BadRows, match=f"{place}: "):
        read_rows(tmp_path / name)
