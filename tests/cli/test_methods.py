"""`kitout methods` shows of every registered method what its code says, in a table, on a page and as JSON."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field
from rich.console import Console
from typer.testing import CliRunner, Result

from kitout import LoRA
from kitout.cli import app, methods
from kitout.cli.methods import method_info, parse_docstring
from kitout.method import REGISTRY, Method
from kitout.train.config.type_text import type_text
from laws.cases import CASES


def kitout_methods(*args: str) -> Result:
    return CliRunner().invoke(app, ["methods", *args])


def test_the_table_has_every_method_with_its_learning_rate() -> None:
    result = kitout_methods()
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head.split("  ")[0] == "method"
    by_name = {line.split()[0]: line for line in lines}
    for name, method in REGISTRY.items():
        cells = [cell.strip() for cell in by_name[name].split("  ") if cell.strip()]
        assert cells[3:6] == [
            f"{method.training.lr:g}",
            f"{method.training.weight_decay:g}",
            "yes" if method.mergeable else "no",
        ]
    assert "attn.q attn.v" in by_name["LoRA"]
    assert "every attention call" in by_name["PrefixTuning"]


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_page_lists_every_setting(name: str) -> None:
    result = kitout_methods(name.lower())
    assert result.exit_code == 0, result.output
    head, table = result.output.split("\n\n")
    assert head.startswith(f"{name}: ")
    assert f"learning rate {REGISTRY[name].training.lr:g} with AdamW; a warning from " in head
    settings = [line.split()[0] for line in table.splitlines()[1:]]
    assert settings == list(REGISTRY[name].model_fields)


def test_a_page_has_types_bounds_and_descriptions() -> None:
    lines = {line.split()[0]: " ".join(line.split()) for line in kitout_methods("LoRA").output.splitlines() if line}
    assert lines["rank"].startswith("rank 8 whole number | settings (name: whole number) a number, or numbers by role")
    assert lines["dropout"] == "dropout 0.0 number >= 0, < 1 on x."
    assert lines["init"].startswith("init default default | pissa")
    assert lines["layers"].startswith("layers all text")


def test_json_is_what_the_code_says() -> None:
    pages = json.loads(kitout_methods("--json").output)
    assert [page["name"] for page in pages] == list(REGISTRY)
    for page in pages:
        method = REGISTRY[page["name"]]
        assert page == json.loads(json.dumps(method_info(method)))
        assert (page["lr"], page["weight_decay"], page["head_lr"]) == (
            method.training.lr,
            method.training.weight_decay,
            method.training.head_lr,
        )
        assert page["lr"] < page["warn_from"] < page["refuse_from"]
    assert json.loads(kitout_methods("IA3", "--json").output) == next(page for page in pages if page["name"] == "IA3")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("loar", "did you mean 'LoRA'?"),
        ("Prefix", "did you mean 'PrefixTuning'?"),
        ("xyz", "known: AdaptFormer, BitFit"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_suggestion(name: str, hint: str) -> None:
    result = kitout_methods(name)
    assert result.exit_code == 1
    assert f"error: there is no method {name!r}: {hint}" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_setting_of_every_method_is_described(name: str) -> None:
    summary, setting_texts = parse_docstring(REGISTRY[name])
    undescribed = [field for field in REGISTRY[name].model_fields if not setting_texts.get(field)]
    assert not undescribed, f"describe them in {name}'s docstring: '{undescribed[0]}: ...'"
    assert 10 < len(summary) < 140


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_a_mix_refuses_is_a_limitation(case: Any) -> None:
    if not case.mixes or not case.strengths:
        assert "Mix" in type(case.method).limitations


def test_a_users_own_method_needs_no_description() -> None:
    class Bare(Method):
        default_targets: ClassVar[str] = "attn.v"
        width: int = Field(default=8, ge=1, le=64)
        kinds: tuple[int, ...] | Literal["none"] | None = None

    page = method_info(Bare)
    assert (page["summary"], page["default_location"], page["lr"]) == ("", "attn.v", Method.training.lr)
    assert page["settings"][-2:] == [
        {"name": "width", "default": 8, "type": "whole number >= 1, <= 64", "description": ""},
        {"name": "kinds", "default": None, "type": "list of whole number | none", "description": ""},
    ]


def test_types_are_as_one_writes_them() -> None:
    assert type_text(dict[str, float] | None) == "settings (name: number)"
    assert type_text(Literal["a", "b"]) == "a | b"


def test_a_terminal_gets_a_drawn_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(methods, "Console", lambda: Console(force_terminal=True, width=150, color_system=None))
    methods.methods()
    methods.methods("prompttuning")
    shown = capsys.readouterr().out
    assert "┃ method" in shown
    assert "list of whole number" in shown
    assert LoRA.__name__ in shown
