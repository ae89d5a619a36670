"""Conversions on a few rows in each source's own layout, and an ONNX file written byte by byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kitout.assets import convert_sets as sets
from kitout.assets.convert_models import read_dinov2_tensors


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def put(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_tweets_survive_broken_bytes(raw: Path, out: Path) -> None:
    (raw / "t.csv").write_bytes(b'sentiment,confidence,text\nnegative,1," bad \xff, really "\npositive,1,fine\n')
    sets.convert_tweets(raw, out)
    assert lines(out / "tweets.jsonl") == [
        {"text": "bad �, really", "label": "negative"},
        {"text": "fine", "label": "positive"},
    ]


def test_boolq_train_holds_no_question_of_dev(raw: Path, out: Path) -> None:
    rows = [{"question": f"q{i}", "passage": "p", "label": i % 2 == 0} for i in range(4)]
    put(raw / "combined.jsonl", *rows, {"question": "unlabelled", "passage": "p"})
    put(raw / "dev.jsonl", {"question": "q3", "passage": "other wording of p", "answer": "False"})
    sets.convert_boolq(raw, out)
    train = lines(out / "train.jsonl")
    assert [row["response"] for row in train] == ["yes", "no", "yes"]
    assert not any("q3" in row["prompt"] for row in train)
    assert [row["response"] for row in lines(out / "dev.jsonl")] == ["no"]


def test_choices_lose_their_letters_and_rows_without_an_answer_are_left_out(raw: Path, out: Path) -> None:
    put(
        raw / "x.jsonl",
        {"passage": "P.", "question": "Q?", "options": "\nA. one\nB. two ", "answer": "B. two"},
        {"question": "Q?", "options": "A. one\nB. two", "answer": ["one"]},
        {"question": "Q?", "options": "A. one\nB. two", "answer": "C. three"},
    )
    sets.convert_choices(raw, out)
    assert lines(out / "choices.jsonl") == [
        {"question": "P. Q?", "choices": ["one", "two"], "answer": 1},
        {"question": "Q?", "choices": ["one", "two"], "answer": 0},
    ]


def test_incorrect_answers_become_pairs(raw: Path, out: Path) -> None:
    put(
        raw / "x.jsonl",
        {"question": "who", "answer": "['him', 'her']", "def_incorrect_predictions": "['it', 'it', 'that']"},
        {"question": "none", "answer": "['x']", "def_incorrect_predictions": ""},
    )
    sets.convert_nq_pairs(raw, out)
    assert [(row["chosen"], row["rejected"]) for row in lines(out / "pairs.jsonl")] == [("him", "it"), ("him", "that")]


def test_pairs_of_equal_answers_are_left_out(raw: Path, out: Path) -> None:
    row = {"article_sent": "A long one.", "correct_sent": "Right.", "incorrect_sent": "Wrong."}
    put(raw / "x.jsonl", row, row | {"incorrect_sent": "Right. "})
    sets.convert_factual_pairs(raw, out)
    (pair,) = lines(out / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("Right.", "Wrong.")


def test_chat_takes_the_first_two_lines(raw: Path, out: Path) -> None:
    (raw / "a.yml").write_text("conversations:\n- - hi\n  - hello\n  - hey\n- - alone\n- - 2 + 2\n  - 4\n")
    sets.convert_chat(raw, out)
    assert lines(out / "answers.jsonl") == [
        {"prompt": "hi", "response": "hello"},
        {"prompt": "2 + 2", "response": "4"},
    ]


def test_mnist_is_images_and_labels(raw: Path, out: Path) -> None:
    with gzip.open(raw / "m.csv.gz", "wt") as file:
        file.write("\n".join(",".join(["7"] * 784 + [str(label)]) for label in (3, 1)))
    sets.convert_mnist(raw, out)
    with np.load(out / "images.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (2, 28, 28)
        assert arrays["labels"].tolist() == [3, 1]


def test_orange_tables_skip_their_header(raw: Path, out: Path) -> None:
    for split in ("train", "test"):
        (raw / f"x-{split}.tab").write_text(f"class\ttext\nd\tstring\nclass\tmeta\nearn\t{split} words\n\tblank\n")
    sets.convert_orange(raw, out)
    assert lines(out / "train.jsonl") == [{"text": "train words", "label": "earn"}]
    assert lines(out / "test.jsonl") == [{"text": "test words", "label": "earn"}]


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, value: np.ndarray[Any, np.dtype[np.float32]], packed: bool) -> bytes:
    dims = b"".join(map(varint, value.shape))
    shape = field(1, dims) if packed else b"".join(varint(1 << 3) + varint(d) for d in value.shape)
    return field(5, shape + varint(2 << 3) + varint(1) + field(8, name.encode()) + field(9, value.tobytes()))


def node(op: str, name: str, *inputs: str) -> bytes:
    return field(1, b"".join(field(1, i.encode()) for i in inputs) + field(3, name.encode()) + field(4, op.encode()))


def test_onnx_weights_get_their_names_back(tmp_path: Path) -> None:
    rows = np.arange(6, dtype="<f4").reshape(2, 3)
    start, patches = np.ones((1, 1, 3), "<f4"), np.zeros((1, 300, 3), "<f4")
    graph = b"".join(
        (
            node("MatMul", "/backbone/layer/0/query/MatMul", "x", "onnx::MatMul_1"),
            node("MatMul", "/head/MatMul", "x", "other"),
            node("Concat", "/backbone/embeddings/Concat_6", "start", "patches_now"),
            node("Reshape", "/backbone/embeddings/Reshape_1", "patches", "shape"),
            tensor("onnx::MatMul_1", rows, packed=False),
            tensor("other", rows, packed=True),
            tensor("backbone.norm.weight", rows[0], packed=True),
            tensor("start", start, packed=True),
            tensor("patches", patches, packed=False),
        )
    )
    path = tmp_path / "x.onnx"
    path.write_bytes(varint(1 << 3) + varint(8) + field(7, graph))
    tensors = read_dinov2_tensors(path)
    assert np.array_equal(tensors["layer.0.query.weight"], rows.T)
    assert np.array_equal(tensors["norm.weight"], rows[0])
    assert tensors["embeddings.position_embeddings"].shape == (1, 301, 3)
    assert tensors["embeddings.position_embeddings"][0, 0, 0] == 1
    assert not any("head" in name for name in tensors)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\x3a\x7fabc", b"<html></html>"])
def test_files_that_are_not_onnx_raise(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError):
        read_dinov2_tensors(tmp_path / "x.onnx")
