"""Parquet files: the rows of the same csv, or a plain message; and long lists of errors that are cut short."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kitout.data.read.tables import DataError, add_first, read_rows
from kitout.errors import Errors, KitoutError


def test_parquet_gives_the_rows_of_the_csv(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"file": ["a.png", "b.png"], "kind": ["x", "y"]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("file,kind\na.png,x\nb.png,y\n")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [row for _, row in read_rows(tmp_path / "a.csv")]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\0" * 40 + b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
        read_rows(tmp_path / "a.parquet")


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r" install .*\[data\]'"):
        read_rows(tmp_path / "a.parquet")


def test_many_errors_of_one_kind_are_counted() -> None:
    errors = Errors(KitoutError, "x")
    add_first(errors, [str(i) for i in range(9)], "rows")
    assert errors.messages == ["0", "1", "2", "3", "4", "and 4 more such rows"]
    with pytest.raises(KitoutError, match=r"^x: 9 errors\n"):
        errors.raise_if_any()


@pytest.mark.parametrize(
    ("number", "shown"),
    [(5, ["0", "1", "2", "3", "4"]), (4, ["0", "1", "2", "3"]), (6, ["0", "1", "2", "and 3 more rows"])],
)
def test_a_list_of_errors_is_cut_where_that_makes_it_shorter(number: int, shown: list[str]) -> None:
    errors = Errors(KitoutError, "x")
    for i in range(number):
        errors.add(str(i))
    errors.shorten(4 if number < 6 else 3, "rows")
    assert errors.messages == shown
    assert errors.num_errors == number


@pytest.mark.parametrize(("encoding", "named"), [("latin-1", "WINDOWS-1252"), ("utf-16", "UTF-16")])
def test_another_encoding_is_refused_with_the_line_that_converts_it(tmp_path: Path, encoding: str, named: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\nläuft,x\n", encoding=encoding)
    with pytest.raises(DataError, match=rf"is not UTF-8 \(byte \d+\).*: iconv -f {named} -t UTF-8 ") as error:
        read_rows(tmp_path / "a.csv")
    if shutil.which("iconv"):
        subprocess.run(str(error.value).rpartition(": ")[2], shell=True, check=True, cwd=tmp_path)
        assert [row for _, row in read_rows(tmp_path / "utf8.csv")] == [{"text": "läuft", "label": "x"}]
