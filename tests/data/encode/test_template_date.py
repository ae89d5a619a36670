"""Templates that print today's date print that of one day, in each of the ways they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kitout.data.encode.template_date import fix_template_date, with_fixed_date

Make = Callable[..., Any]
DATED = {
    "{{ strftime_now('%d %b %Y') }}": "{{ '05 Mar 2024' }}",
    '{%- set date = strftime_now( "%Y-%m-%d" ) %}{{ date }}': '{%- set date = "2024-03-05" %}{{ date }}',
    "{{ strftime_now(format='%B %d, %Y') }}": "{{ 'March 05, 2024' }}",
    "{% if strftime_now is defined %}{{ strftime_now('%H:%M') }}{% endif %}": (
        "{% if strftime_now is defined %}{{ '00:00' }}{% endif %}"
    ),
    "no date": "no date",
}


@pytest.mark.parametrize(("template", "fixed"), DATED.items())
def test_every_call_is_replaced(tokenizer: Make, template: str, fixed: str) -> None:
    assert with_fixed_date(template, "2024-03-05") == fixed
    tok = tokenizer("chatml")
    tok.chat_template = {"default": template, "tool_use": "x"}
    fix_template_date(tok, "2024-03-05")
    assert tok.chat_template == {"default": fixed, "tool_use": "x"}
    tok.chat_template = template
    fix_template_date(tok, "2024-03-05")
    assert tok.chat_template == fixed


def test_a_computed_format_is_warned_of(tokenizer: Make) -> None:
    tok = tokenizer("chatml")
    assert fix_template_date(tok, "2024-03-05") == ""
    tok.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}"
    assert "prints today's date in a format that it computes ('strftime_now(f)" in fix_template_date(tok, "2024-03-05")
