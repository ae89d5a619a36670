"""The scripts of examples/ run as they stand, with the built-in models and data they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

pytestmark = [pytest.mark.slow, pytest.mark.assets]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_script_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out").is_dir()
    assert done.stdout.strip()
