"""The folder of a comparison: one page that needs nothing else, CSV and JSON; the same files for the same runs."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from compare.run_folders import finished, ranked
from compare.test_rankings import METHODS
from kitout.compare import compare_runs, write_folder
from kitout.compare.page import render_page
from kitout.errors import ConfigError, KitoutError


def table_of(root: Path, tests: int = 1, **more: Any) -> Any:
    return compare_runs([
        ranked(
            root / f"task{k}", {"lora": 0.9, "ia3": 0.5}, methods=METHODS, test=f"test {k}", file=f"d{k}.csv", **more
        )
        for k in range(tests)
    ])  # fmt: skip


def test_a_folder_has_page_csv_and_json(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    for name in ("a", "b"):
        write_folder(table, tmp_path / "new" / name)
    write_folder(table, tmp_path / "new" / "a")  # again
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / "new" / name).iterdir()} for name in ("a", "b")
    )
    assert first == second
    assert sorted(first) == ["report.html", "results.json", "table.csv"]
    assert json.loads(first["results.json"])["rankings"][0]["letters"] == ["a", "b"]
    rows = list(csv.DictReader(io.StringIO(first["table.csv"].decode())))
    assert [row["accuracy_group"] for row in rows] == ["a", "b"]
    page = first["report.html"].decode()
    assert page.count("<svg") == 1, "quality by size"
    assert not re.search(r"(src|href)=|<script|@import|url\(", page), "nothing of it lies elsewhere"
    assert "width=device-width" in page
    assert "@media print" in page
    assert "better than task0/ia3 by" in page


@pytest.mark.parametrize(
    ("tests", "said"),
    [((), "2 methods, no test set"), ((0,), "1 method on 1 test set"), ((0, 1), "2 methods on 1 test set")],
)
def test_the_heading_counts_test_sets_alone(tests: tuple[int, ...], said: str, tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / str(k), {"accuracy": 0.5} if k in tests else {}, method=("LoRA", "IA3")[k]) for k in (0, 1)
    ]
    assert f">{said}</h1>" in render_page(compare_runs(runs))


def test_pictures_of_forgetting_and_of_mean_ranks(tmp_path: Path) -> None:
    sets = {"piqa": {"metric": "acc", "difference": -0.01}}
    names = [f"{job}-s{seed}" for job in ("lora", "ia3") for seed in range(3)]
    forgetting = {name: {"summary": "", "sets": sets} for name in names}
    table = table_of(tmp_path, tests=5, forgetting=forgetting)
    write_folder(table, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("accuracy lost on other sets, points (mean)") == 5
    assert "critical difference" in page
    assert page.count("<svg") == 11


def test_names_cannot_act_on_the_page(tmp_path: Path) -> None:
    adapters = [{"name": "lora-s0", "method": "<script>alert(1)</script>", "seconds": 1.0}]
    page = tmp_path / "out" / "report.html"
    write_folder(table_of(tmp_path, adapters=adapters), page.parent)
    assert "<script" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()


def test_what_is_no_folder_of_a_comparison_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    with pytest.raises(ConfigError, match=r"name a folder.*or a file that ends with \.csv"):
        write_folder(table, tmp_path / "report.html")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(KitoutError, match=r"something else: it holds letter\.txt, which replacing it would delete"):
        write_folder(table, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").exists()
