"""`kitout train` as a person meets it: help, a file to begin with, faults in words. No run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kitout.cli import app
from kitout.method import REGISTRY
from kitout.train.config import describe, yaml_file
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig


def kitout(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


def test_help_explains_every_setting_and_format() -> None:
    from kitout.data.examples.formats import FORMATS

    told = kitout("--help")
    assert told.exit_code == 0
    for section in describe.sections():
        for setting in section.settings:
            assert f"{section.name}.{setting.name}".lstrip(".") in told.stdout
            assert setting.text.split(" ")[0] in told.stdout
    for name in FORMATS:
        assert f"\n  {name}" in told.stdout
    assert "kitout train --example > run.yaml" in told.stdout
    assert "--dry-run" in told.stdout


def test_the_example_is_a_run() -> None:
    told = kitout("--example")
    assert told.exit_code == 0
    assert load(yaml_file.parse_yaml(told.stdout, "example")).model.name


def test_the_schema_is_json() -> None:
    told = kitout("--json-schema")
    assert told.exit_code == 0
    schema = json.loads(told.stdout)
    assert len(schema["properties"]["method"]["oneOf"]) == len(REGISTRY)
    assert set(schema["properties"]) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to train"),
        (["nowhere.yaml"], "nowhere.yaml is not there"),
        (["a.yaml", "b.yaml"], "one run.yaml at a time, found a.yaml, b.yaml"),
        (["--model", "m"], "data: must be said"),
        (["--model", "m", "--data", "d", "trian.lr=1"], "did you mean 'train'?"),
        (["--model", "m", "--data", "d", "--method", "lora"], "did you mean 'LoRA'?"),
        (["--model", "m", "--data", "d", "model.dtype=float16", "model.device=cpu"], "float16 overflows"),
    ],
)
def test_faults_in_words(words: list[str], said: str) -> None:
    told = kitout(*words)
    assert told.exit_code == 1
    assert told.stdout == ""
    assert said in told.stderr
    assert told.stderr.startswith("error: ")
    assert "Traceback" not in told.stderr


def test_shortcuts_are_words_not_yaml_and_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: m, dtype: float32}\ndata: d\nmethod: IA3\n")
    told = kitout(str(file), "--model", "1e-4", "--data", "[x", "train.lr=x", "--method", "SSF", "method.name=IIA3")
    assert told.exit_code == 1
    assert "2 errors" in told.stderr
    assert "no method 'IIA3': did you mean 'IA3'" in told.stderr


def test_an_encoding_that_cannot_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert app(["train", "🦉.yaml"], standalone_mode=False) == 1
    assert isinstance(sys.stderr, io.TextIOWrapper)
    sys.stderr.flush()
    sys.stderr.buffer.seek(0)
    assert b"\\U0001f989.yaml is not there" in sys.stderr.buffer.read()
