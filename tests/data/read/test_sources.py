"""Files, folders, lists, slices and the hub's own library become examples by split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitout.data.examples.examples import LabeledText, Text
from kitout.data.read.hub import open_hub_tables
from kitout.data.read.sources import load_examples, open_source, split_named
from kitout.data.read.tables import DataError


def write(path: Path, *texts: str, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts))
    return path


def texts(examples: Any) -> list[str]:
    return [example.source_text() for example in examples]


def test_a_file_and_its_locations(tmp_path: Path) -> None:
    loaded = load_examples(write(tmp_path / "x.jsonl", "a", "b"))
    assert loaded.splits == {"": (Text("a"), Text("b"))}
    assert [e.location for e in loaded.splits[""]] == ["x.jsonl:1", "x.jsonl:2"]
    assert [str(reading) for reading in loaded.readings] == ["text (text)"]


def test_lines_of_a_text_file_and_rows_of_every_table(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x.txt").write_text("a\n\n b \r\n")
    assert texts(load_examples(tmp_path / "x.txt").splits[""]) == ["a", " b "]
    (tmp_path / "x.csv").write_text('text,label\n"a, b",1\n"c\nd",2\n')
    (tmp_path / "x.tsv").write_text("text\tlabel\na, b\t1\n")
    (tmp_path / "x.json").write_text('[{"text": "a, b", "label": 1}]')
    parquet.write_table(pyarrow.table({"text": ["a, b"], "label": [1]}), tmp_path / "x.parquet")
    for ending in ("csv", "tsv", "json", "parquet"):
        first = load_examples(tmp_path / f"x.{ending}").splits[""][0]
        assert (first.source_text(), first.answer_text()) == ("a, b", "1")


def test_a_folder_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", "a")
    write(tmp_path / "train-00001-of-00002.jsonl", "b")
    write(tmp_path / "dev.jsonl", "c")
    write(tmp_path / "test.jsonl", "d")
    (tmp_path / "info.json").write_text("{}")
    splits = load_examples(tmp_path).splits
    assert {name: texts(examples) for name, examples in splits.items()} == {
        "validation": ["c"], "test": ["d"], "train": ["a", "b"],
    }  # fmt: skip


def test_a_folder_with_one_table_and_one_that_is_ambiguous(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl", "a")
    (tmp_path / "asset.json").write_text("{}")
    assert texts(load_examples(tmp_path).splits[""]) == ["a"]
    write(tmp_path / "more.jsonl", "b")
    with pytest.raises(DataError, match=r"has answers.jsonl, asset.json, more.jsonl; expected a train file"):
        load_examples(tmp_path)
    assert texts(load_examples([tmp_path / "answers.jsonl", tmp_path / "more.jsonl"]).splits[""]) == ["a", "b"]


def test_named_splits_and_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *"abcdef")
    loaded = load_examples({"train": f"{path}#2", "test": [f"{path}#4:6"]})
    assert {name: texts(examples) for name, examples in loaded.splits.items()} == {
        "train": ["a", "b"],
        "test": ["e", "f"],
    }
    assert loaded.splits["test"][0].location == "x.jsonl:5"
    with pytest.raises(DataError, match="'dev' is not a split"):
        load_examples({"dev": path})
    with pytest.raises(DataError, match="has no rows"):
        load_examples(f"{path}#7:9")


def test_a_folder_given_for_a_split_gives_that_split(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / "both" / f"{name}.jsonl", name)
    write(tmp_path / "other.jsonl", "other")
    loaded = load_examples({"train": tmp_path / "both", "validation": tmp_path / "other.jsonl"})
    assert {name: texts(examples) for name, examples in loaded.splits.items()} == {
        "train": ["train"],
        "validation": ["other"],
    }
    with pytest.raises(DataError, match="the source of validation has the splits test, train, but no validation"):
        load_examples({"validation": tmp_path / "both"})


def test_a_limit_is_sampled_by_the_seed_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(f"{i:03}" for i in range(100)))
    drawn = texts(load_examples(path, limit=10, seed=1).splits[""])
    assert len(drawn) == 10
    assert drawn == sorted(drawn) == texts(load_examples(path, limit=10, seed=1).splits[""])
    assert drawn != texts(load_examples(path, limit=10, seed=2).splits[""])
    assert len(load_examples(path, limit=1000).splits[""]) == 100


def test_names_of_splits() -> None:
    named = {"train": "train", "TRAIN_sft": "train", "dev": "validation", "validation_matched": "validation",
             "test-00000-of-00001": "test", "trainer": "", "tested": "", "unsupervised": ""}  # fmt: skip
    assert {name: split_named(name) for name in named} == named


BAD_FILES = [
    ("x.jsonl", "", "has no rows"),
    ("x.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not JSON \(Expecting value, column 10\)"),
    ("x.jsonl", '["a"]\n', "line 1: a JSON list, expected an object"),
    ("x.jsonl", "[" * 100_000, "line 1: not JSON"),
    ("x.json", '[{"text": "a"},\n{"text" "b"}]', "line 2: not JSON"),
    ("x.csv", "text,label\na,b,c\n", "line 2: more fields than the 2 of the header"),
    ("x.csv", "text,text\na,b\n", "the header names 'text' more than once"),
    ("x.csv", "text,label\n", "has no rows"),
    ("x.xml", "<a/>", "unknown format .xml; use .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "a")
    with pytest.raises(DataError, match=r"there is no file .*trian.jsonl; beside it: train.jsonl"):
        load_examples(tmp_path / "trian.jsonl")
    for path in (str(tmp_path / "folder"), "./folder", "../some/folder", "~/nowhere-at-all"):
        with pytest.raises(DataError, match="there is no file"):
            load_examples(path)
    with pytest.raises(DataError, match="the list of data files is empty"):
        load_examples([])


def test_a_long_field_of_a_table_is_read(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "x.csv").write_text(f"text,label\n{long},a\n")
    assert load_examples(tmp_path / "x.csv").splits[""] == (LabeledText(long, "a"),)


def test_the_hubs_library_opens_sets_with_their_class_names(tmp_path: Path) -> None:
    """A local data set in the hub's form: nothing else of the hub can be reached here."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kinds = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["neg", "pos"]),
        tags=datasets.List(datasets.ClassLabel(names=["O", "B"])),
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    dataset = datasets.Dataset.from_dict(rows, features=kinds)
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "other"):
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    for streaming in (False, True):
        tables = open_hub_tables(str(tmp_path / "set"), split_named, streaming)
        assert [table.split for table in tables] == ["train", "validation"]
        first_rows = [row for _, row in tables[0].iter_rows()]
        assert [row["label"] for row in first_rows] == ["pos", "neg", None]
        assert [row["tags"] for row in first_rows] == [["O", "B"], [], ["B"]]
        assert [len(list(t.iter_rows())) for t in open_hub_tables(f"{tmp_path}/set#1:3", split_named, streaming)] == [
            2,
            2,
        ]
        (split,) = open_hub_tables(f"{tmp_path}/set#validation", split_named, streaming)
        assert (split.split, len(split.read_rows())) == ("validation", 3)


def test_a_name_that_is_nowhere_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(
        DataError, match="no file or folder owner/name:config, and as a data set of the hub it does not"
    ):
        open_source("owner/name:config")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r" install .*\[hub\]'"):
        open_source("owner/name")
