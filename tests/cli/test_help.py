"""The help of every verb: a sentence, an example, and only words of the field."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from kitout.cli import app

VERBS = (
    "advise",
    "align",
    "assets",
    "chat",
    "combine",
    "compare",
    "convert",
    "demo",
    "demo text",
    "demo vision",
    "doctor",
    "export",
    "extract",
    "merge",
    "inspect",
    "methods",
    "predict",
    "probe-sites",
    "train",
)
REFUSED = re.compile(
    r"(?i)\b(worn|wears?|wearing|told|laid|beneath|faulty|learnt|gist|filler|commonest|parted|embedded)\b"
)


def help_of(verb: str) -> str:
    result = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_first_page_lists_every_verb() -> None:
    page = help_of("")
    for verb in (verb for verb in VERBS if " " not in verb):
        assert re.search(rf"\b{verb}  +[A-Z]", page), verb
    assert not REFUSED.search(page)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_an_example(verb: str) -> None:
    page = help_of(verb)
    first, *_ = verb.split()
    assert len(re.findall(rf"kitout {first}\b", page)) > 0
    assert re.search(r"(?i)example", page)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("align", "train")])
def test_only_words_of_the_field(verb: str) -> None:
    assert not REFUSED.findall(help_of(verb))


@pytest.mark.parametrize("verb", ["chat", "predict"])
def test_it_fits_a_terminal_of_80_columns(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert f"kitout {verb} runs/" in result.stdout
