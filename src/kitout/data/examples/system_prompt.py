"""A system turn for examples that have none, by the setting `system_prompt` of a source.

Chats get the turn (of pairs, judged answers and prompts too), labeled texts become chats whose answer is the label,
other kinds are refused. It knows no table and
no template.
"""

from __future__ import annotations

from dataclasses import replace

from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import Chat, Example, LabeledText
from kitout.data.examples.preferences import PreferencePair, Prompt, UnpairedAnswer
from kitout.data.read.tables import DataError


def with_system_prompt(example: Example, system_prompt: str) -> Example:
    """The example with this system turn. A labeled text becomes a chat, with its label as the answer."""
    if isinstance(example, PreferencePair):
        chosen, rejected = (_with_turn(side, system_prompt) for side in (example.chosen, example.rejected))
        return replace(example, chosen=chosen, rejected=rejected)
    if isinstance(example, UnpairedAnswer):
        return replace(example, answer=_with_turn(example.answer, system_prompt))
    if isinstance(example, Prompt) and isinstance(example.prompt, Chat):
        return replace(example, prompt=_with_turn(example.prompt, system_prompt))
    return _with_turn(example, system_prompt)


def _with_turn(example: Example, system_prompt: str) -> Chat:
    if isinstance(example, LabeledText):
        answer = example.answer_text() or "none"
        return replace(one_turn_chat(example.source_text(), answer, system_prompt), remarks=example.remarks)
    if isinstance(example, Chat):
        return example.with_system(system_prompt)
    raise DataError(
        f"a system prompt goes with chats and labeled texts; this is a {type(example).__name__.lower()} example, "
        "which is trained on as it is: leave system_prompt out"
    )
