"""Answers to the same prompts from the start, the middle and the end of a run, by a rule, from completions.jsonl.

Taken are the prompts that were answered at the most different steps, the first ones of these; of each the first answer
at the first, the middle and the last of its steps. Where no prompt comes twice, it is the first prompt of the first,
the middle and the last round. It knows lines of that file, and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kitout.evaluate.report.section import AnswerOverTime, PromptOverTime, Section
from kitout.format import format_number

NUM_PROMPTS, MAX_CHARS = 3, 2000


def answers_section(lines: Sequence[Mapping[str, Any]]) -> Section | None:
    """None without answers."""
    shown, rule = prompts_over_time(lines)
    if not shown:
        return None
    return Section(title="Answers over time", prompts=shown, caption=f"Selected by a rule, not by hand: {rule}.")


def prompts_over_time(lines: Sequence[Mapping[str, Any]]) -> tuple[list[PromptOverTime], str]:
    """What is shown, and the rule that selected it."""
    by_prompt: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:  # the first answer at each step
        by_prompt.setdefault(json.dumps(line["prompt"], ensure_ascii=False), {}).setdefault(int(line["step"]), line)
    most = max((len(steps) for steps in by_prompt.values()), default=0)
    if most > 1:
        repeated = [steps for steps in by_prompt.values() if len(steps) == most][:NUM_PROMPTS]
        shown = [_over_time(_ends([steps[step] for step in sorted(steps)])) for steps in repeated]
        return shown, "the first prompts of those that were answered in the most rounds, each with its first answer"
    first_of_round = {int(line["step"]): line for line in reversed(lines)}
    rounds = _ends([first_of_round[step] for step in sorted(first_of_round)])
    return [
        _over_time([line]) for line in rounds
    ], "no prompt came twice: the first one of the first, middle and last round"


def _ends(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first, the middle and the last, each once."""
    places = dict.fromkeys((0, (len(lines) - 1) // 2, len(lines) - 1)) if lines else {}
    return [lines[i] for i in places]


def _over_time(lines: Sequence[Mapping[str, Any]]) -> PromptOverTime:
    answers = [
        AnswerOverTime(step=int(line["step"]), text=str(line["completion"])[:MAX_CHARS], reward=_reward(line))
        for line in lines
    ]
    return PromptOverTime(prompt=_prompt(lines[0]["prompt"])[:MAX_CHARS], answers=answers)


def _reward(line: Mapping[str, Any]) -> str:
    return "none" if line.get("total") is None else format_number(float(line["total"]))


def _prompt(prompt: Any) -> str:
    """A text, or what the turns say."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
