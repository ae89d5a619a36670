"""A dry run over a large table looks at a sample of it and says so; small tables are read as ever."""

from __future__ import annotations

import collections
import re
import time
from pathlib import Path

import pytest

from kitout.base import memory
from kitout.data.read import row_sample
from kitout.data.read.row_sample import RowSample
from kitout.data.read.sources import load_examples
from kitout.errors import DataError
from kitout.train.config.schema import DataConfig
from kitout.train.setup import datasets
from tiny_models import jsonl, reviews, tokenizer

NUM_ROWS = 400


def sorted_by_class(count: int = NUM_ROWS) -> list[dict[str, object]]:
    """As files often are: all rows of one class, then all of the other."""
    return [{"text": f"a film of {i} days", "label": "good" if i < count // 2 else "bad"} for i in range(count)]


def test_a_sample_is_drawn_from_the_whole_table() -> None:
    sample = RowSample(max_rows=100)
    assert sample.draw(range(50)) == list(range(50))
    assert (sample.scale, sample.note) == (1, "")
    drawn = sample.draw(range(10_000))
    assert drawn == sorted(set(drawn)) == sample.draw(range(10_000))
    assert len(drawn) == 100
    assert sum(drawn) / 100 == pytest.approx(5_000, rel=0.2)
    assert (sample.scale, sample.note) == (100, "counted over a sample of 100 of 10,000 rows")


def test_long_rows_and_slow_reading_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_CHARS", 100), ("MIN_ROWS", 5), ("_CLOCK_ROWS", 10)):
        monkeypatch.setattr(row_sample, name, value)
    sample = RowSample(max_rows=50)
    assert len(sample.draw([{"text": "ten chars."}] * 200)) == 10
    sample = RowSample(max_rows=50, seconds=0.0)
    time.sleep(0.01)
    assert len(sample.draw(range(10_000))) == 50
    assert sample.note == "counted over a sample of 50 of the first 60 rows (reading took long)"


def test_a_sample_of_long_rows_is_drawn_from_the_whole_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_CHARS", 1_000), ("MIN_ROWS", 5)):
        monkeypatch.setattr(row_sample, name, value)
    sample = RowSample(max_rows=500)
    drawn = sample.draw(sorted_by_class())  # all of them have a place, about fifty fit
    assert len(drawn) < 100
    assert {row["label"] for row in drawn} == {"good", "bad"}
    assert drawn == sample.draw(sorted_by_class())


@pytest.mark.parametrize("split", ["one table", "tables of their own"])
def test_a_dry_run_reckons_with_all_rows(tmp_path: Path, split: str) -> None:
    data = jsonl(tmp_path / "d.jsonl", sorted_by_class())
    test = {} if split == "one table" else {"test": str(jsonl(tmp_path / "t.jsonl", reviews(30))), "validation": 0}
    config = DataConfig(train=str(data), **test)  # type: ignore[arg-type]
    task = ("classification", tokenizer(template=False), False)
    whole = datasets.load_datasets(config, *task)
    sampled = datasets.load_datasets(config, *task, sample=RowSample(max_rows=100))
    assert sampled.sampled_of == pytest.approx(len(whole.train), abs=4)
    assert len(sampled.train) < len(whole.train)
    assert sampled.label_names == whole.label_names
    assert min(collections.Counter(item.label for item in sampled.train).values()) > 20
    assert "d.jsonl: counted over a sample of 100 of 400 rows" in sampled.reading_notes
    small = datasets.load_datasets(config, *task, sample=RowSample())
    assert (small.digest, small.sampled_of, small.reading_notes) == (whole.digest, None, whole.reading_notes)


def test_bad_rows_are_found_in_all_of_it(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "d.jsonl", sorted_by_class())
    with rows.open("a") as file:
        file.write("{no json\n")
    with pytest.raises(DataError, match=r"line 401: .*not JSON"):
        load_examples(rows, sample=RowSample(max_rows=100))


def test_a_limit_bounds_what_is_reckoned_with(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", sorted_by_class())
    loaded = load_examples(data, limit=200, sample=RowSample(max_rows=100))
    assert loaded.scales[""] == 2
    assert load_examples(data, limit=50, sample=RowSample(max_rows=100)).scales[""] == 1


def test_what_memory_will_not_hold_is_said_by_a_dry_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(tmp_path / "d.jsonl", sorted_by_class())
    monkeypatch.setattr("kitout.train.setup.reading_progress.MIN_GROWTH_BYTES", 1000)
    monkeypatch.setattr(memory, "available", lambda _: 10_000)
    with pytest.raises(DataError, match=re.compile(r"sample of 100 of 400 rows: too large.*data\.streaming=true")):
        datasets.load_datasets(
            DataConfig(train=str(data)), "classification", tokenizer(template=False), False,
            sample=RowSample(max_rows=100),
        )  # fmt: skip


def test_images_that_are_opened_are_a_sample(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    from kitout.data.read.image_folders import load_images

    for i in range(40):
        folder = tmp_path / ("a" if i < 20 else "b")
        folder.mkdir(exist_ok=True)
        pillow.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i:02}.png")
    sample = RowSample(max_rows=10)
    images = load_images(tmp_path, sample=sample)
    assert (len(images), images.label_names, sample.scale) == (10, ("a", "b"), 4)
    assert set(images.labels) == {0, 1}
