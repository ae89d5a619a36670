"""Parquet files: bytes are text or images, class numbers have the names that the file keeps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kitout.data.examples.examples import LabeledText, TaggedWords
from kitout.data.read.image_folders import load_images
from kitout.data.read.sources import load_examples
from kitout.data.read.tables import DataError, read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(file: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    table = pyarrow.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, file)
    return file


def test_tool_calls_that_went_through_parquet(tmp_path: Path) -> None:
    """Arrow gives every object the keys of all others, and null where they had none."""
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"city": "Ulm"})]
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}] for call in calls]
    tools = [[{"function": {"name": "f", "parameters": {name: {"type": "t"}}}}] for name in ("x", "city")]
    file = write(tmp_path / "x.parquet", {"messages": chats, "tools": tools})
    assert read_rows(file)[0][1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "city": None}
    examples: Any = load_examples(file).splits[""]
    for example, call, tool in zip(examples, calls, tools, strict=True):
        (read,) = example.turns[1].message["tool_calls"]
        assert read["function"] == call["function"]
        assert [dict(one) for one in example.tools] == tool


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), color, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_bytes_are_text(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"text": ["é".encode(), b"b"], "label": [b"x", b"y"], "more": [[b"z"], []]})
    assert read_rows(file)[0] == (1, {"text": "é", "label": "x", "more": ["z"]})
    assert load_examples(file).splits[""] == (LabeledText("é", "x"), LabeledText("b", "y"))
    with pytest.raises(DataError, match="line 1: a cell holds 3 bytes that are no UTF-8 text"):
        load_examples(write(tmp_path / "y.parquet", {"text": [b"\xff\xfe\x00"], "label": ["a"]}))
    with pytest.raises(DataError, match="bytes that are no UTF-8 text"):
        load_examples(write(tmp_path / "z.parquet", {"text": ["a"], "label": [b"\xff\xfe\x00"]}))


LIST_FEATURES: list[Any] = [
    {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["O", "B-X"]}, "length": -1},
    {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["O", "B-X"]}},
    [{"_type": "ClassLabel", "names": ["O", "B-X"]}],
]


@pytest.mark.parametrize("feature", LIST_FEATURES)
def test_classes_have_the_names_of_the_file(tmp_path: Path, feature: Any) -> None:
    one = {"text": {"_type": "Value", "dtype": "string"}, "label": {"_type": "ClassLabel", "names": ["bad", "good"]}}
    file = write(tmp_path / "x.parquet", {"text": ["a", "b", "c"], "label": [1, 0, -1]}, one)
    assert [row["label"] for _, row in read_rows(file)] == ["good", "bad", None]
    columns = {"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}
    file = write(tmp_path / "y.parquet", columns, {"ner_tags": feature})
    assert load_examples(file).splits[""] == (TaggedWords(("a", "b"), ("B-X", "O")),)


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": []}}', b'{"info": null}'])
def test_other_metadata_changes_nothing(tmp_path: Path, metadata: bytes) -> None:
    table = pyarrow.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet") == [(1, {"text": "a", "label": 1})]


def test_names_written_by_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"]),
         "tags": datasets.List(datasets.ClassLabel(names=["O", "X"]))}
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": ["a"], "label": [1], "tags": [[0, 1]]}, features=features)
    data.to_parquet(str(tmp_path / "x.parquet"))
    assert read_rows(tmp_path / "x.parquet") == [(1, {"text": "a", "label": "good", "tags": ["O", "X"]})]


@pytest.mark.parametrize("as_struct", [False, True])
def test_images_in_a_table(tmp_path: Path, as_struct: bool) -> None:
    images: list[Any] = [png(10 * i) for i in range(4)]
    if as_struct:
        images = [{"bytes": image, "path": "a.png"} for image in images]
    names = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    file = write(tmp_path / "x.parquet", {"image": images, "label": [0, 1, 0, 1]}, names)
    found = load_images(file)
    assert (len(found), found.label_names, found.labels) == (4, ("cat", "dog"), (0, 1, 0, 1))
    assert np.asarray(found.open(3)).tolist() == np.full((4, 5, 3), 30).tolist()
    images[2] = {"bytes": b"\xff\x00", "path": None} if as_struct else b"\xff\x00"
    with pytest.raises(DataError, match=r"y\.parquet:3: it is not an image that can be read"):
        load_images(write(tmp_path / "y.parquet", {"image": images, "label": [0, 1, 0, 1]}))
