"""docs/add-a-method.md, followed to the letter in a copy of the package, ends green.

The first python block becomes the method's file, every `diff` block is applied, and the checks that the page names are
run on the copy, ruff included. A line of a diff that no longer fits its file fails here. It knows nothing of methods.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pages import blocks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add-a-method.md"
COPIED = ("src", "tests", "docs", "README.md", "pyproject.toml")


@dataclass
class Insertion:
    """Neighboring added lines of a diff."""

    path: str
    before: str | None
    """The line they stand behind; None where they stand in front of `after`."""
    after: str | None = None
    lines: list[str] = field(default_factory=list)

    def apply(self, root: Path) -> None:
        file = root / self.path
        lines = file.read_text(encoding="utf-8").splitlines()
        anchor = self.after if self.before is None else self.before
        assert lines.count(anchor or "") == 1, f"{self.path} has the line {anchor!r} {lines.count(anchor or '')} times"
        at = lines.index(anchor or "") + (self.before is not None)
        file.write_text("\n".join([*lines[:at], *self.lines, *lines[at:], ""]), encoding="utf-8")


def insertions(diff: str) -> Iterator[Insertion]:
    """What a diff of additions alone says: "+++ path", then lines that begin with a blank or a plus."""
    path, before = "", None
    pending: Insertion | None = None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path, before = line[4:], None
        elif line.startswith("+"):
            pending = pending or Insertion(path, before)
            pending.lines.append(line[1:])
            continue
        else:
            before = line[1:]
        if pending is not None:
            pending.after = None if line.startswith("+++ ") else before
            yield pending
            pending = None
    if pending is not None:
        yield pending


def test_the_reader_of_diffs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n two\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("one\n", encoding="utf-8")
    diff = "+++ a.txt\n one\n+1\n+1\n  two\n+ 2\n+++ b.txt\n+0\n one\n"
    for insertion in insertions(diff):
        insertion.apply(tmp_path)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "one\n1\n1\n two\n 2\n"
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "0\none\n"
    with pytest.raises(AssertionError, match=r"b\.txt has the line 'two' 0 times"):
        Insertion("b.txt", "two", lines=["3"]).apply(tmp_path)


def test_following_the_page_ends_green(tmp_path: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    page = list(blocks(PAGE.read_text(encoding="utf-8"), ("python", "diff", "")))
    method = tmp_path / "src/kitout/methods/gate.py"
    method.write_text(next(block.code for block in page if block.tag == "python") + "\n", encoding="utf-8")
    changed = {method}
    for block in page:
        for insertion in insertions(block.code) if block.tag == "diff" else ():
            insertion.apply(tmp_path)
            changed.add(tmp_path / insertion.path)
    commands = [block.code.replace("\\\n", " ").split() for block in page if block.tag == ""]
    assert [command[0] for command in commands] == ["pytest"], "the page names its quick checks, once"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    python_files = sorted(str(file) for file in changed if file.suffix == ".py")
    for arguments in (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *commands[0][1:]],
        ["-m", "ruff", "check", "--no-cache", *python_files],
        ["-m", "ruff", "format", "--no-cache", "--check", *python_files],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
