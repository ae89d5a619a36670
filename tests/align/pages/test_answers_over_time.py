"""Which answers show how a run went: the same prompts at its start, middle and end, by a rule."""

from __future__ import annotations

from typing import Any

from kitout.align.pages.answers_over_time import answers_section, prompts_over_time


def line(step: int, prompt: Any, text: str, total: float | None = 0.5) -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "completion": text, "total": total}


def test_prompts_that_come_back_are_shown_over_time() -> None:
    chat = [{"role": "user", "content": "again"}]
    lines = [line(1, "once", "a"), line(1, chat, "first"), line(1, chat, "second"), line(3, chat, "third"),
             line(5, chat, "fifth", None), line(7, chat, "seventh", 1.0), line(7, "other", "b")]  # fmt: skip
    shown, rule = prompts_over_time(lines)
    (only,) = shown
    assert only.prompt == "user: again"
    assert [(one.step, one.text, one.reward) for one in only.answers] == [
        (1, "first", "0.5"), (3, "third", "0.5"), (7, "seventh", "1"),
    ]  # fmt: skip
    assert "most rounds" in rule


def test_prompts_that_come_once_are_the_first_of_their_rounds() -> None:
    lines = [line(step, f"{step} {name}", name) for step in (1, 2, 3, 4, 5) for name in "ab"]
    shown, rule = prompts_over_time(lines)
    assert [one.prompt for one in shown] == ["1 a", "3 a", "5 a"]
    assert [len(one.answers) for one in shown] == [1, 1, 1]
    assert "no prompt came twice" in rule


def test_nothing_sampled_has_no_section() -> None:
    assert answers_section([]) is None
    section = answers_section([line(1, "a", "b")])
    assert section is not None
    assert section.caption.startswith("Selected by a rule")
