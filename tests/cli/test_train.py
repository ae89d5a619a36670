"""`kitout train` as a person meets it: help, a config file to start from, errors in plain words. No run."""

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


def kitout_train(*args: str) -> Result:
    return CliRunner().invoke(app, ["train", *args])


def test_help_explains_every_setting_and_format() -> None:
    from kitout.data.examples.format_table import FORMATS

    result = kitout_train("--help")
    assert result.exit_code == 0
    for section in describe.sections():
        for setting in section.settings:
            assert f"{section.name}.{setting.name}".lstrip(".") in result.stdout
            assert setting.text.split(" ")[0] in result.stdout
    for name in FORMATS:
        assert f"\n  {name}" in result.stdout
    assert "kitout train --example > run.yaml" in result.stdout
    assert "--dry-run" in result.stdout


def test_the_example_is_a_run() -> None:
    result = kitout_train("--example")
    assert result.exit_code == 0
    assert load(yaml_file.parse_yaml(result.stdout, "example")).model.name


def test_the_schema_is_json() -> None:
    result = kitout_train("--json-schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert len(schema["properties"]["method"]["oneOf"]) == len(REGISTRY)
    assert set(schema["properties"]) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "a run.yaml is required, or --model and --data"),
        (["nowhere.yaml"], "nowhere.yaml is not there"),
        (["a.yaml", "b.yaml"], "one run.yaml at a time, not a.yaml, b.yaml"),
        (["--model", "m"], "data: is required"),
        (["--model", "m", "--data", "d", "--lr", "1e-4"], "there is no option --lr; write train.lr"),
        (["--model", "m", "--data", "d", "--batch-size=8"], "no option --batch-size; write train.batch_size"),
        (["--model", "m", "--data", "d", "--train.lr=1"], "no option --train.lr; write a setting as train.lr=1"),
        (["--modle", "m", "--seed", "1"], "2 errors\n  - there is no option --modle; did you mean --model?"),
        (["--model", "m", "--data", "d", "trian.lr=1"], "did you mean 'train'?"),
        (["--model", "m", "--data", "d", "--method", "loar"], "did you mean 'LoRA'?"),
        (["--model", "m", "--data", "d", "model.dtype=float16", "model.device=cpu"], "float16 overflows"),
    ],
)
def test_errors_in_plain_words(args: list[str], message: str) -> None:
    result = kitout_train(*args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_shorthands_are_text_not_yaml_and_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: m, dtype: float32}\ndata: d\nmethod: IA3\n")
    result = kitout_train(
        str(file), "--model", "1e-4", "--data", "[x", "train.lr=x", "--method", "SSF", "method.name=IIA3"
    )
    assert result.exit_code == 1
    assert "2 errors" in result.stderr
    assert "no method 'IIA3': did you mean 'IA3'" in result.stderr


def test_text_that_the_terminal_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert app(["train", "🦉.yaml"], standalone_mode=False) == 1
    assert isinstance(sys.stderr, io.TextIOWrapper)
    sys.stderr.flush()
    sys.stderr.buffer.seek(0)
    assert b"\\U0001f989.yaml is not there" in sys.stderr.buffer.read()
