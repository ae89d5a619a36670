"""One input of the test split as a user would give it: what `kitout train` prints, the report and the card show.

A short one is taken, by a rule: the first that fits on a line, else the start of the shortest. It knows examples, and
neither encoders nor models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kitout.data.examples.convert import SUMMARIZE_PROMPT
from kitout.data.examples.examples import Chat, Completion, Example, LabeledText, Text
from kitout.data.examples.preferences import PreferencePair, Prompt, UnpairedAnswer
from kitout.evaluate.report.next_steps import MAX_CHARS, shorten

CONSIDERED = 200  # examples, from the front
START_WORDS = 6  # of plain text, to go on from


def short_example(examples: Sequence[Example]) -> Example | None:
    """The example to show; None where there is none."""
    first = [example for example in examples[:CONSIDERED] if example.source_text().strip()]
    fitting = (e for e in first if len(e.source_text()) <= MAX_CHARS and e.source_text()[0].isalnum())
    return next(fitting, None) or min(first, key=lambda e: len(e.source_text()), default=None)


def asked(example: PreferencePair | UnpairedAnswer | Prompt) -> Example:
    """What alignment reads as what it asks: a prompt, with an answer where there is one."""
    if isinstance(example, PreferencePair):
        return example.chosen
    if isinstance(example, UnpairedAnswer):
        return example.answer
    return Completion(example.prompt, "") if isinstance(example.prompt, str) else example.prompt


def sample_answer(example: Example | None) -> dict[str, Any]:
    """The same for a reward adapter: a prompt and an answer as fields of `NextSteps`."""
    if not isinstance(example, PreferencePair):
        return {}
    prompt = sample_input(example, {}, is_closed=True)["text"]
    return {"row": {"prompt": prompt, "completion": shorten(example.answer_text())}}


def sample_input(example: Example | None, columns: Mapping[str, str], is_closed: bool) -> dict[str, Any]:
    """Its input as fields of `NextSteps`. columns: the table's, by role. is_closed: the answers are a closed set."""
    if example is None:
        return {}
    if isinstance(example, LabeledText) and example.text_pair is not None:
        names = [columns.get(role, role) for role in ("text", "second")]
        return {"row": dict(zip(names, map(shorten, (example.text, example.text_pair)), strict=True))}
    if isinstance(example, Text):
        return {"text": shorten(" ".join(example.text.split()[:START_WORDS]))}
    if isinstance(example, PreferencePair | UnpairedAnswer | Prompt):
        return sample_input(asked(example), columns, is_closed)
    if not isinstance(example, Chat):
        return {"text": shorten(example.source_text())}
    end = max((i for i, turn in enumerate(example.turns) if turn.role == "assistant"), default=len(example.turns))
    turns = example.turns[:end]
    users = [turn.text for turn in turns if turn.role == "user"]
    text = shorten(users[-1].removesuffix(f"\n\n{SUMMARIZE_PROMPT}")) if users else ""
    if is_closed or not users:
        return {"text": text}
    messages = [{"role": turn.role, "content": turn.text} for turn in turns if turn.role in ("system", "user")]
    if len(users) > 1 or len(messages) != len(turns):  # one question is enough to try
        messages = [m for m in messages if m["role"] == "system"] + [{"role": "user", "content": users[-1]}]
    shown = [m | {"content": shorten(m["content"])} if m["role"] == "user" else m for m in messages]
    return {"text": text, "messages": shown}
