"""Reading, cleaning and splitting: no test text is ever trained on, and a bad file says where it is bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kitout.data.read.tables import DataError
from kitout.demo.data import Example, digest, load, normal, split, unique


def examples(n: int) -> list[Example]:
    return [Example(f"text number {i}", ("good", "bad", "good")[i % 3]) for i in range(n)]


def test_formats_give_the_same_examples(tmp_path: Path) -> None:
    rows = [{"id": 1, "Tweet": "fine, really", "sentiment": "good"}, {"id": 2, "Tweet": "no\nway", "sentiment": "bad"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('id,Tweet,sentiment\n1,"fine, really",good\n2,"no\nway",bad\n')
    (tmp_path / "a.tsv").write_text('id\tTweet\tsentiment\n1\tfine, really\tgood\n2\t"no\nway"\tbad\n')
    found = [load(tmp_path / f"a.{end}") for end in ("jsonl", "json", "csv", "tsv")]
    assert found == [[Example("fine, really", "good"), Example("no\nway", "bad")]] * 4


def test_numbers_are_labels_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 0}\n{"text": "y", "label": true}\n')
    assert [e.label for e in load(tmp_path / "a.jsonl")] == ["0", "True"]


def test_columns_are_named_when_not_found_or_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("words,kind\nhello,x\n")
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.csv")
    for part in ("words, kind", "--text NAME", "--label NAME"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="no column 'wrods' for the text"):
        load(tmp_path / "a.csv", text="wrods", label="kind")
    assert load(tmp_path / "a.csv", text="words", label="kind") == [Example("hello", "x")]


def test_bad_lines_are_told_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "y"}\n{"text": \n[1, 2]\n')
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.jsonl")
    assert "line 2: not JSON" in str(caught.value)
    assert "line 3: a JSON list" in str(caught.value)
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": "y"}\n' + '{"text": "", "label": "y"}\n' * 9)
    with pytest.raises(DataError, match="line 2: ") as caught:
        load(tmp_path / "b.jsonl")
    assert "and 4 more such rows" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "there is no file"),
        ("a.xlsx", b"x", "unknown format .xlsx"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", "not UTF-8"),
        ("a.json", b'{"text": 1}', "must hold a list"),
        ("a.json", b'{"text": 1}\n{"text": 2}', "name it .jsonl"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path / name)


def test_a_missing_file_names_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "tweets.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"beside it: tweets\.csv"):
        load(tmp_path / "tweet.csv")


def test_texts_that_differ_in_nothing_said_are_one() -> None:
    same = ["RT @you: Big NEWS!! http://t.co/a", "big news", "Big, news... https://t.co/b", "@me big news"]
    assert len({normal(text) for text in same}) == 1
    assert normal("big news today") != normal("big news")
    assert normal("!!!") == "!!!"  # a text of signs alone is still a text


def test_duplicates_take_the_label_most_of_them_carry() -> None:
    copies = [Example("Hi!", "bad"), Example("hi", "good"), Example("HI", "good"), Example("other", "bad")]
    assert unique(copies) == [Example("Hi!", "good"), Example("other", "bad")]


def test_no_test_text_is_trained_on_and_the_test_stays_when_training_grows() -> None:
    rows = examples(200) + [Example(e.text.upper() + " http://t.co/x", e.label) for e in examples(200)]
    small, large = split(rows, train=50, test=40, seed=1), split(rows, train=500, test=40, seed=1)
    assert small.test == large.test
    assert small.dropped == 200
    assert (len(small.train), len(large.train)) == (50, 160)
    assert not {normal(e.text) for e in large.train} & {normal(e.text) for e in large.test}
    assert split(rows, 50, 40, seed=2).test != small.test
    assert digest(small.test) == digest(large.test)
    assert small.labels == ["good", "bad"]
    assert small.majority == sum(e.label == "good" for e in small.test) / 40


def test_what_cannot_be_learnt_from_is_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        split(examples(30), 10, 10, seed=0)
    with pytest.raises(DataError, match="100 different labels"):
        split([Example(f"t {i}", f"label {i}") for i in range(100)], 10, 30, seed=0)
    with pytest.raises(DataError, match="1 different labels"):
        split([Example(f"t {i}", "same") for i in range(100)], 10, 30, seed=0)
