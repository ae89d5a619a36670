"""What one types next: commands that a shell splits as meant, lines of Python whose literals are the input."""

from __future__ import annotations

import ast
import shlex
from typing import Any

import pytest

from kitout.evaluate.report.next_steps import MAX_CHARS, NextSteps, shorten

TEXTS = [
    "The parcel never came",
    "it isn't here",
    'she said "no"',
    'it\'s "here"',
    "$HOME `date` \\n !! %PATH%",
    "-5 degrees",
    "--help",
    "; rm -rf /",
    "a # b",
    "日本語 naïve 😀",
    "",
]


def literals(lines: list[str]) -> list[Any]:
    """The arguments of the calls, by line."""
    calls = [n for line in lines for n in ast.walk(ast.parse(line)) if isinstance(n, ast.Call)]
    return [
        ast.literal_eval(argument) for call in calls for argument in call.args if not isinstance(argument, ast.Call)
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_reaches_the_shell_and_python_as_it_is(text: str) -> None:
    steps = NextSteps(folder="runs/a b/adapter", text=text, file="new reviews.csv")
    *shown, from_file = map(shlex.split, steps.commands)
    assert from_file == ["kitout", "predict", "runs/a b/adapter", "new reviews.csv", "--out", "predictions.jsonl"]
    separator = ["--"] if text.startswith("-") else []
    assert shown == ([["kitout", "predict", "runs/a b/adapter", *separator, text]] if text else [])
    assert literals(steps.python_lines) == ["runs/a b/adapter", text]


def test_usual_texts_are_in_double_quotes_which_every_shell_has() -> None:
    steps = NextSteps(folder="runs/x/adapter", text="it isn't here")
    assert steps.commands == [
        'kitout predict runs/x/adapter "it isn\'t here"',
        "kitout predict runs/x/adapter FILE --out predictions.jsonl",
    ]
    assert steps.python_lines == ["import kitout", 'p = kitout.load("runs/x/adapter")', 'print(p("it isn\'t here"))']


@pytest.mark.parametrize("text", ["\x1b[2J", "a\u202eb", "a\x9bb", "\x07 bell", "line\u2028line", "nul\x00"])
def test_nothing_in_an_input_acts_on_a_terminal(text: str) -> None:
    steps = NextSteps(folder="f", text=text)
    printed = "".join([*steps.commands, *steps.python_lines])
    assert printed.isprintable()
    assert literals(steps.python_lines)[1] == text


def test_pairs_chats_and_writers() -> None:
    pair = {"premise": "it isn't", "hypothesis": 'a "b"'}
    assert literals(NextSteps(folder="f", row=pair).python_lines) == ["f", pair]
    assert len(NextSteps(folder="f", row=pair).commands) == 1
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "Hi\nthere"}]
    chat = NextSteps(folder="f", base="/b", text="Hi", messages=messages, writes=True)
    assert chat.commands[0] == "kitout chat f --model /b"
    assert chat.python_lines[1] == 'p = kitout.load("f", base="/b")'
    assert literals(chat.python_lines) == ["f", messages]
    assert 'p.generate("Once", max_new_tokens=' in NextSteps(folder="f", text="Once", writes=True).python_lines[-1]


def test_on_any_machine_no_path_is_left() -> None:
    steps = NextSteps(folder="/home/me/runs/x", text="/home/me/1.png", file="/home/me/set", is_image=True)
    printed = "\n".join([*steps.on_any_machine("BASE").commands, *steps.on_any_machine("BASE").python_lines])
    assert "/home/me" not in printed
    assert 'p = kitout.load("FOLDER", base="BASE")\nprint(p("IMAGE"))' in printed


def test_a_card_has_no_example_of_the_data() -> None:
    """It is published with the adapter."""
    secret = [{"role": "user", "content": "my number is 12345"}]
    for steps in (
        NextSteps(folder="f", text="my number is 12345"),
        NextSteps(folder="f", row={"premise": "my number is 12345", "hypothesis": "12345"}),
        NextSteps(folder="f", text="12345", messages=secret, writes=True),
    ):
        card = steps.on_any_machine("")
        assert "12345" not in "\n".join([*card.commands, *card.python_lines])


def test_a_long_text_is_cut_between_words() -> None:
    assert shorten("word " * 100) == ("word " * 20).strip()
    assert shorten("x" * 300) == "x" * MAX_CHARS
    assert shorten("short") == "short"


def test_a_reward_adapter_rewards_a_policy() -> None:
    row = {"prompt": "What is 2 + 2?", "completion": "4"}
    steps = NextSteps(folder="runs/r/adapter", row=row, rewards_on="smollm2-135m", file="pairs.jsonl")
    assert steps.commands == [
        "kitout align ppo --model smollm2-135m --data PROMPTS --reward runs/r/adapter --out DIR",
        "kitout predict runs/r/adapter pairs.jsonl --out predictions.jsonl",
    ]
    assert literals(steps.python_lines) == ["runs/r/adapter", row]
    card = steps.on_any_machine("BASE")
    assert card.commands[0] == "kitout align ppo --model BASE --data PROMPTS --reward FOLDER --out DIR"
