"""`kitout doctor` and `kitout --version`: text or JSON, and an exit status that says whether what is needed works."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kitout.cli import app
from kitout.doctor import Diagnosis, Finding
from kitout.version import __version__


@pytest.mark.parametrize(("is_needed", "status"), [(True, 1), (False, 0)])
def test_the_exit_status(monkeypatch: pytest.MonkeyPatch, is_needed: bool, status: int) -> None:
    diagnosis = Diagnosis(findings=[Finding("it is broken", "mend it", is_needed)])
    monkeypatch.setattr("kitout.doctor.diagnose", lambda: diagnosis)
    text = CliRunner().invoke(app, ["doctor"])
    assert text.exit_code == status
    assert "problem: it is broken: mend it\n" in text.stdout
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == status
    assert json.loads(as_json.stdout)["findings"][0]["fix"] == "mend it"


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"kitout {__version__}\n")


@pytest.mark.slow
def test_end_to_end() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kitout", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["versions"]["kitout"] == __version__
