"""From a file to predictions: columns, bad rows, resuming, formats of the result; and every input that is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import kitout
from kitout.cli import app
from kitout.files.usage_record import BaseRecord, TextRecord, UsageRecord
from kitout.predict import table
from kitout.predict.input_rows import InputRows
from kitout.predict.predictor import Predictor
from tiny_models import decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")


def train(model: Path, data: Path, out: Path, **more: Any) -> Path:
    settings = {
        "model": {"name": str(model), "dtype": "float32"}, "data": str(data), "output": {"folder": str(out)},
        "train": {"batch_size": 8, "steps": 4, "lr": 1e-2},
        "evaluate": {"generate_examples": 0, "max_new_tokens": 3}, **more,
    }  # fmt: skip
    kitout.train(settings, log=lambda _line: None)
    return out / "adapter"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the column `body` of a csv."""
    root = tmp_path_factory.mktemp("classifier")
    with (root / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "topic"])
        writer.writerows([row["text"], row["label"]] for row in reviews(60))
    return train(encoder(root / "model"), root / "d.csv", root / "out")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that answers questions."""
    root = tmp_path_factory.mktemp("writer")
    rows = [{"instruction": row["text"], "output": f"{row['label']} {i}"} for i, row in enumerate(reviews(40))]
    return train(decoder(root / "model"), jsonl(root / "d.jsonl", rows), root / "out")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A predictor is loaded once for each adapter."""
    load = kitout.load
    known: dict[str, Predictor] = KNOWN

    def cached(*folders: Any, **options: Any) -> Predictor:
        key = f"{folders} {options}"
        if key not in known:
            known[key] = load(*folders, **options)
        return known[key]

    monkeypatch.setattr(kitout, "load", cached)


LOADING: dict[str, Any] = {"base": None, "task": None, "device": "auto", "dtype": None}  # as the verb says it
KNOWN: dict[str, Predictor] = {}


def predict(*args: object, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, args)], input=text)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def table_of(tmp_path: Path, number: int, **more: str) -> Path:
    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "body", "topic", *more])
        writer.writeheader()
        for i, row in enumerate(reviews(number, seed=1)):
            writer.writerow({"id": i, "body": row["text"], "topic": row["label"], **more})
    return tmp_path / "new.csv"


def test_columns_are_kept_and_predictions_added(adapter: Path, tmp_path: Path) -> None:
    file = table_of(tmp_path, 9)
    result = predict(adapter, file, "--out", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "p.jsonl")
    p = kitout.load(adapter)
    by_hand = p([row["text"] for row in reviews(9, seed=1)])
    for i, (row, prediction) in enumerate(zip(rows, by_hand, strict=True)):
        assert list(row) == ["id", "body", "topic", "label", "probability", "probabilities"]
        assert row["id"] == str(i)
        assert row["label"] == prediction.label
        assert row["probabilities"] == pytest.approx(prediction.probabilities)
    num_right = sum(row["label"] == row["topic"] for row in rows)
    assert f"accuracy {100 * num_right / 9:.1f} % (95 % interval" in result.stdout
    assert "on 9 rows" in result.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new.csv", "p.jsonl"]


def test_a_column_of_the_users_is_never_overwritten(adapter: Path, tmp_path: Path) -> None:
    file = table_of(tmp_path, 4, label="mine", predicted_label="mine too")
    result = predict(adapter, file, "--out", tmp_path / "p.csv")
    assert "'label' is a column of yours: the prediction is in 'predicted_label_2'" in result.output
    with (tmp_path / "p.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert {row["label"] for row in rows} == {"mine"}
    assert {row["predicted_label_2"] for row in rows} <= {"good", "bad"}
    assert set(json.loads(rows[0]["probabilities"])) == {"good", "bad"}


def test_the_column_of_the_text(adapter: Path, tmp_path: Path) -> None:
    usual = jsonl(tmp_path / "usual.jsonl", [{"text": "a", "n": 1}])
    result = predict(adapter, usual)
    assert result.exit_code == 0
    assert "text is read from the column 'text' ('body' in training)" in result.output
    odd = jsonl(tmp_path / "odd.jsonl", [{"x": 1, "notes": "a great day", "y": "b"}])
    result = predict(adapter, odd)
    assert result.exit_code == 1
    assert "--column text=notes" in result.output
    assert predict(adapter, odd, "--column", "text=notes").exit_code == 0
    assert predict(adapter, odd, "--column", "notes").exit_code == 0
    result = predict(adapter, odd, "--column", "text=note")
    assert "did you mean 'notes'?" in result.output


def test_bad_rows(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"body": "a"}\n{"body": ""}\nnot json\n{"body": "b"}\n{"body": ["c"]}\n')
    result = predict(adapter, file, "--out", tmp_path / "p.jsonl")
    assert result.exit_code == 1
    for line in ("bad.jsonl line 2: 'body' is empty", "bad.jsonl line 3: not JSON", "bad.jsonl line 5"):
        assert line in result.output
    assert "--bad-rows skip" in result.output
    result = predict(adapter, file, "--out", tmp_path / "p.jsonl", "--bad-rows", "skip")
    assert result.exit_code == 0, result.output
    assert "left out: 3 rows" in result.output
    assert [row["body"] for row in rows_of(tmp_path / "p.jsonl")] == ["a", "b"]
    lines = tmp_path / "lines.txt"
    lines.write_text("a\n\nb\n\n\n")
    assert "lines.txt line 2: the line is empty" in predict(adapter, lines).output
    result = predict(adapter, lines, "--bad-rows", "skip")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["a", "b"]
    result = predict(adapter, "-", text="a\n\nb\n\n")
    assert "stdin line 2" in result.output


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("killed")])
@pytest.mark.parametrize("at", [0, 2])
def test_it_resumes_to_the_same_bytes(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, at: int
) -> None:
    monkeypatch.setattr(table, "CHUNK_ROWS", 8)
    file = table_of(tmp_path, 20)
    whole, out = tmp_path / "whole.csv", tmp_path / "p.csv"
    assert predict(adapter, file, "--out", whole).exit_code == 0
    calls = 0
    real = table.OutputFile.append

    def append(self: Any, rows: list[Any], progress: Any) -> None:
        nonlocal calls
        if calls == at:
            with self.part.open("ab") as opened:  # half of what was to be written
                opened.write(b'{"body": "half')
            raise stop
        calls += 1
        real(self, rows, progress)

    with monkeypatch.context() as patched:
        patched.setattr(table.OutputFile, "append", append)
        assert predict(adapter, file, "--out", out).exit_code != 0
        assert not out.exists()
    result = predict(adapter, file, "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == whole.read_bytes()
    assert "on 20 rows" in result.stdout


def test_it_does_not_go_on_with_something_else(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK_ROWS", 8)
    file, out = table_of(tmp_path, 20), tmp_path / "p.jsonl"
    real = table.OutputFile.append

    def append(self: Any, rows: list[Any], progress: Any) -> None:
        real(self, rows, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(table.OutputFile, "append", append)
        result = predict(adapter, file, "--out", out)
        assert result.exit_code == 130
        assert "the same command goes on" in result.output
    result = predict(adapter, file, "--out", out, "--batch-size", 2)
    assert "batch_size was None, and is 2" in result.output
    text = file.read_text()
    file.write_text(text.replace("good", "fine", 1))
    result = predict(adapter, file, "--out", out)
    assert "not what these predictions were begun with" in result.output
    file.write_text(text)
    assert predict(adapter, file, "--out", out).exit_code == 0
    assert "exists already" in predict(adapter, file, "--out", out).output
    assert predict(adapter, file, "--out", out, "--overwrite").exit_code == 0


def test_a_million_rows_are_not_kept(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk: what is read is predicted before more is read."""
    from kitout.predict import input_rows

    monkeypatch.setattr(table, "CHUNK_ROWS", 8)
    monkeypatch.setattr(input_rows, "HEAD_ROWS", 8)
    read = done = most = 0
    real = input_rows.tables.iter_rows

    def counted(*args: Any) -> Iterator[Any]:
        nonlocal read, most
        for row in real(*args):
            read += 1
            most = max(most, read - done)
            yield row

    def count(number: int) -> None:
        nonlocal done
        done = max(done, number)

    monkeypatch.setattr(input_rows.tables, "iter_rows", counted)
    predictor = kitout.load(adapter)
    from kitout.predict.open_input import open_input
    from kitout.predict.output_file import OutputFile

    rows = open_input(str(table_of(tmp_path, 80)), predictor.usage, {}, None)  # type: ignore[arg-type]
    table.TablePredictor(predictor).to_file(rows, OutputFile(tmp_path / "p.jsonl"), {}, count)
    assert read == 80
    assert most <= 16


def test_parquet_keeps_its_types(adapter: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import datetime

    import pyarrow.parquet as pq

    day = datetime.datetime(2024, 5, 1, 12)
    data = {"body": ["a", "b"], "when": [day, None], "n": pyarrow.array([1, 2], pyarrow.int8()), "x": [1.5, None]}
    pq.write_table(pyarrow.table(data), tmp_path / "d.parquet")
    assert predict(adapter, tmp_path / "d.parquet", "--out", tmp_path / "p.parquet").exit_code == 0
    found = pq.read_table(tmp_path / "p.parquet")
    before = pq.read_schema(tmp_path / "d.parquet")
    assert [found.schema.field(name).type for name in data] == [before.field(name).type for name in data]
    assert found.column("when").to_pylist() == [day, None]
    assert set(found.column_names) == {*data, "label", "probability", "probabilities"}


def test_one_text(adapter: Path, writer: Path) -> None:
    result = predict(adapter, "a great day")
    assert json.loads(result.stdout)["label"] in ("good", "bad")
    answer = json.loads(predict(writer, "the cat").stdout)
    assert list(answer) == ["prompt", "text"]
    assert answer["text"] == kitout.load(writer)("the cat").text


def test_truncated_inputs_are_counted(adapter: Path, writer: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "long.jsonl", [{"body": "cat " * 300}, {"body": "cat"}])
    result = predict(adapter, file)
    assert "truncated: 1 input longer than the adapter reads" in result.output
    file = jsonl(tmp_path / "prompt.jsonl", [{"instruction": "cat " * 1200}, {"instruction": "cat"}])
    assert "truncated: 1 input" in predict(writer, file).output


REFUSED = {
    "nowhere.csv": "there is no file or folder nowhere.csv",
    "a/b/c": "there is no file or folder a/b/c",
    "": "the text is empty",
    "FOLDER": "is a folder, and this adapter reads texts",
    "pic.png": "is an image, and this adapter reads texts",
    "data.xlsx": "unknown format .xlsx",
}


@pytest.mark.parametrize("source", REFUSED)
def test_inputs_that_are_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Before the model is loaded."""
    monkeypatch.setattr(kitout, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    for name in ("pic.png", "data.xlsx"):
        (tmp_path / name).write_bytes(b"x")
    result = predict(adapter, str(tmp_path) if source == "FOLDER" else source)
    assert result.exit_code == 1
    assert REFUSED[source] in result.output


def test_a_slash_does_not_make_a_text_a_file(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("yes/no", "24/7", "and/or is fine"):
        assert predict(adapter, text).exit_code == 0
    (tmp_path / "data").mkdir()
    assert "there is no file or folder data/new" in predict(adapter, "data/new").output


def test_columns_are_of_tables(adapter: Path, tmp_path: Path) -> None:
    for source in ("hello", "-", tmp_path):
        result = predict(adapter, source, "--column", "text=body")
        assert result.exit_code == 1
        assert "is no table" in result.output


def test_bytes_that_are_no_text_are_a_bad_row(adapter: Path) -> None:
    for rows, expected in (("error", 1), ("skip", 0)):
        result = predict(adapter, "-", "--bad-rows", rows, text=b"the cat\n\xff\xfe dog\nthe dog\n")
        assert result.exit_code == expected, result.output
        assert "stdin line 2" in result.output
        assert "no UTF-8" in result.output


def test_right_answers_that_cannot_be_read_are_counted(adapter: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"body": "the cat", "topic": "good"}, {"body": "the dog", "topic": {"no": 1}}])
    output = predict(adapter, file, "--out", tmp_path / "out.jsonl").output
    assert "on 1 row" in output or "1 row" in output
    assert "1 rows have a right answer that cannot be read" in output


@pytest.mark.parametrize(
    ("task", "answers"), [("regression", [2.5, 1000.25, None, 3.0]), ("classification", ["2.5", "1000.25", None, "3"])]
)
def test_numbers_with_a_decimal_comma_are_right_answers(tmp_path: Path, task: str, answers: list[Any]) -> None:
    (tmp_path / "t.csv").write_text("text;label\na;2,5\nb;1.000,25\nc;\nd;3\n", encoding="utf-8")
    text = TextRecord(tokenizer="", format="label", columns={"text": "text", "label": "label"}, max_length=8)
    usage = UsageRecord(task=task, base=BaseRecord(name="m", source="folder"), text=text)
    rows = InputRows(usage, "t.csv", tmp_path / "t.csv")
    assert [rows.reference(row.columns) for row in rows] == answers


def test_outputs_that_are_refused(adapter: Path, tmp_path: Path) -> None:
    file = table_of(tmp_path, 2)
    for out, message in {
        "p.xlsx": "the ending decides the format", file: "exists already", tmp_path / "x.csv": "is a folder",
    }.items():  # fmt: skip
        (tmp_path / "x.csv").mkdir(exist_ok=True)
        result = predict(adapter, file, "--out", out)
        assert result.exit_code == 1
        assert message in result.output
    assert "is the input itself" in predict(adapter, file, "--out", file, "--overwrite").output
    assert "holds no adapter" in predict(tmp_path, file).output


def test_text_that_acts_on_a_terminal(adapter: Path) -> None:
    result = predict(adapter, "a \x1b[31m\u202e\x9b day")
    assert json.loads(result.stdout)["text"] == "a \x1b[31m\u202e\x9b day"
    assert not set("\x1b\u202e\x9b") & set(result.stdout)


@pytest.fixture(scope="module")
def looker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of images."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for kind, low in {"dark": 0, "light": 150}.items():
        (root / "set" / kind).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(low, low + 90, (20, 24 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "set" / kind / f"{i}.png")
    return train(vision(root / "model"), root / "set", root / "out")


def test_images(looker: Path, tmp_path: Path) -> None:
    folder = looker.parents[1] / "set"
    result = predict(looker, folder, "--out", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "p.jsonl")
    assert [row["image"] for row in rows] == sorted(f"{kind}/{i}.png" for kind in ("dark", "light") for i in range(8))
    num_right = sum(row["label"] == row["image"].split("/")[0] for row in rows)
    assert f"accuracy {100 * num_right / 16:.1f} %" in result.stdout
    one = json.loads(predict(looker, folder / "dark" / "0.png").stdout)
    assert one["label"] == rows[0]["label"]
    assert one["probability"] == pytest.approx(rows[0]["probability"], abs=1e-5)
    names = [{"path": f"set/{row['image']}", "label": row["image"].split("/")[0]} for row in rows[:3]]
    file = jsonl(folder.parent / "names.jsonl", [*names, {"path": "set/none.png", "label": "dark"}])
    assert "names.jsonl line 4: there is no file" in predict(looker, file).output
    result = predict(looker, file, "--bad-rows", "skip")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["path"] for row in found] == [row["path"] for row in names]
    assert [row["label"] for row in found] == [row["label"] for row in names]  # the user's own
    assert {row["predicted_label"] for row in found} <= {"dark", "light"}
    assert "accuracy" in result.stderr


def test_inputs_that_are_no_images(looker: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for source in (tmp_path / "notes.txt", "a great day", "-", tmp_path):
        result = predict(looker, source, text="hello")
        assert result.exit_code == 1
        assert re.search("reads images|holds no image", result.output), result.output


@pytest.mark.slow
def test_the_command_itself(adapter: Path, tmp_path: Path) -> None:
    """Another process, lines from a pipe."""
    command = [sys.executable, "-m", "kitout", "predict", str(adapter), "-"]
    done = subprocess.run(
        command, input="a great day\nawful\n", capture_output=True, text=True, timeout=100, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a great day", "awful"]


def test_a_folder_of_peft_with_a_head(tmp_path: Path) -> None:
    """It has its own number of classes, and no names for them: that is said."""
    peft = pytest.importorskip("peft")
    model = encoder(tmp_path / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    tuned = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    tuned.save_pretrained(tmp_path / "adapter")
    result = predict(tmp_path / "adapter", "a great day", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "holds no label names" in result.stderr
    ids = kitout.load(tmp_path / "adapter", **{**LOADING, "dtype": "float32"}).tokenizer(
        "a great day", return_tensors="pt"
    )
    with torch.no_grad():
        expected = tuned.eval()(**ids).logits.softmax(-1)[0].tolist()
    assert list(json.loads(result.stdout)["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
