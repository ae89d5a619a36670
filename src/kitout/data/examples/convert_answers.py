"""One row as a preference pair, a judged answer or a prompt: as TRL's data sets have them, and as texts.

Texts become one-turn chats as the format `instruction` makes them; the raw formats keep them character by character,
which is TRL's reading of strings. Messages may leave the prompt out: then it is the beginning that both answers share.
It knows no file. Source: trl.data_utils (extract_prompt).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kitout.data.examples.cells import (
    RowFields,
    answer_text,
    optional_text,
    parse_cell,
    required_list,
    shorten_cell,
)
from kitout.data.examples.convert import instruction_text, question_text
from kitout.data.examples.examples import Chat, Completion, Turn
from kitout.data.examples.preferences import PreferencePair, Prompt, UnpairedAnswer, answer_turns
from kitout.data.examples.turns import to_tools, to_turns
from kitout.data.read.tables import DataError

EQUAL_ANSWERS = "the chosen and the rejected answer are equal: such a pair says nothing"
NO_PROMPT = "there is no prompt: name its column (columns.prompt), or give messages that begin with it"
PROMPT_IN_TEXTS = f"{NO_PROMPT}; where both texts begin with it, write data.train.format=raw_preference"
CUT_ANSWER_REMARK = "the messages end with an answer, which is left out of the prompt"
OTHER_PROMPT_REMARK = "the column of the prompt is not read: the messages of both answers begin with another one"
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_TRUE = {"true", "yes", "good", "desirable", "desired", "chosen", "accepted", "positive", "liked", "up", "thumbs up"}
_FALSE = {"false", "no", "bad", "undesirable", "undesired", "rejected", "negative", "disliked", "down", "thumbs down"}

Turns = tuple[Turn, ...]


def from_preference(row_fields: RowFields) -> PreferencePair:
    """Two answers to a prompt; without one, the messages of both have a common beginning."""
    chosen, rejected = _answer_turns(row_fields, "chosen"), _answer_turns(row_fields, "rejected")
    if (chosen[0].role == "assistant") != (rejected[0].role == "assistant"):
        raise DataError("'chosen' and 'rejected' differ in kind: one begins with an answer, the other with a prompt")
    remarks: tuple[str, ...] = ()
    if chosen[0].role == "assistant":
        is_in_texts = row_fields.get("prompt") is None and not isinstance(row_fields.get("chosen"), list)
        prompt = _prompt_turns(row_fields, PROMPT_IN_TEXTS if is_in_texts else NO_PROMPT)
    else:
        num_shared = _num_shared(chosen, rejected)
        prompt_cell = _messages_or_text(row_fields, "prompt")
        if isinstance(prompt_cell, list):
            prompt = _unflagged(to_turns(prompt_cell))
            if prompt != chosen[: min(num_shared, len(prompt))]:
                raise DataError("'chosen' and 'rejected' do not begin with the messages of the prompt")
            num_shared = len(prompt)
        elif isinstance(prompt_cell, str) and prompt_cell.strip():
            asked = {turn.text.strip() for turn in chosen[:num_shared]}
            remarks = () if prompt_cell.strip() in asked else (OTHER_PROMPT_REMARK,)
        if not num_shared:
            raise DataError("'chosen' and 'rejected' have no common beginning: which prompt do they answer?")
        prompt = _with_system(row_fields, chosen[:num_shared])
        chosen, rejected = chosen[num_shared:], rejected[num_shared:]
        if chosen == rejected == ():
            raise DataError(EQUAL_ANSWERS)
    better, worse = (_chat(row_fields, prompt, *side) for side in ((chosen, "chosen"), (rejected, "rejected")))
    return _pair(better, worse, row_fields, remarks)


def from_raw_preference(row_fields: RowFields) -> PreferencePair:
    """The same of strings, character by character; without a prompt it is the beginning that both share."""
    chosen, rejected = _raw_text(row_fields, "chosen"), _raw_text(row_fields, "rejected")
    if row_fields.get("prompt") is not None:
        prompt = _raw_text(row_fields, "prompt", may_be_empty=True)
    else:
        num_shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
        if num_shared < 0:
            raise DataError("'chosen' and 'rejected' do not part: one is the beginning of the other")
        if num_shared and chosen[num_shared - 1] == " ":
            num_shared -= 1
        prompt, chosen, rejected = chosen[:num_shared], chosen[num_shared:], rejected[num_shared:]
    return _pair(Completion(prompt, chosen), Completion(prompt, rejected), row_fields, ())


def from_unpaired(row_fields: RowFields) -> UnpairedAnswer:
    """An answer to a prompt and whether it is wanted; messages may hold the prompt themselves."""
    is_desirable, answer = _is_desirable(row_fields), _answer_turns(row_fields, "completion")
    if answer[0].role == "assistant":
        prompt = _prompt_turns(row_fields)
    else:
        end = max((i for i, turn in enumerate(answer) if turn.role == "assistant"), default=len(answer))
        prompt, answer = answer[:end], answer[end:]
    return UnpairedAnswer(_chat(row_fields, prompt, answer, "completion"), is_desirable)


def from_raw_unpaired(row_fields: RowFields) -> UnpairedAnswer:
    """The same of strings, character by character."""
    prompt = _raw_text(row_fields, "prompt", may_be_empty=True)
    return UnpairedAnswer(Completion(prompt, _raw_text(row_fields, "completion")), _is_desirable(row_fields))


def from_prompt(row_fields: RowFields) -> Prompt:
    """A text, perhaps with a context, or messages; an answer at the end of the messages is no part of it."""
    turns, is_text = _prompt_turns(row_fields), not isinstance(_messages_or_text(row_fields, "prompt"), list)
    num_turns = len(turns)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not any(turn.role in ("user", "tool") for turn in turns):
        raise DataError("'prompt' has no user turn: nothing is asked")
    chat = Chat(turns, to_tools(row_fields.get("tools")))
    remarks = (CUT_ANSWER_REMARK,) if len(turns) < num_turns else ()
    return Prompt(chat, is_text=is_text, remarks=remarks)


def from_question_prompt(row_fields: RowFields) -> Prompt:
    """A question as the format `question` puts it: behind its passage, with lettered choices."""
    return Prompt(Chat(_text_turns(row_fields, question_text(row_fields))), is_text=True)


def from_raw_prompt(row_fields: RowFields) -> Prompt:
    """A string, character by character."""
    return Prompt(_raw_text(row_fields, "prompt"))


def _pair(
    chosen: Chat | Completion, rejected: Chat | Completion, row_fields: RowFields, remarks: tuple[str, ...]
) -> PreferencePair:
    if _answer_content(chosen) == _answer_content(rejected):
        raise DataError(EQUAL_ANSWERS)
    return PreferencePair(chosen, rejected, _margin(row_fields.get("margin")), remarks=remarks)


def _answer_content(example: Chat | Completion) -> Any:
    """What makes two answers the same: all but the white space around their texts."""
    if isinstance(example, Completion):
        return example.completion.strip()
    return [{**turn.message, "content": str(turn.message.get("content", "")).strip()} for turn in answer_turns(example)]


def _chat(row_fields: RowFields, prompt: Turns, answer: Turns, role: str) -> Chat:
    """A prompt with its answer. All assistant turns of an answer of several turns are flagged as trained on."""
    if not prompt or not any(turn.role in ("user", "tool") for turn in prompt):
        raise DataError(NO_PROMPT)
    for place, turn in (("begins", answer[0]), ("ends", answer[-1])) if answer else ():
        if turn.role != "assistant":
            raise DataError(f"{role!r} {place} with a {turn.role} turn behind the prompt; an answer is the assistant's")
    if not answer:
        raise DataError(f"{role!r} has no answer: it ends where the common prompt does")
    if len(answer) > 1:
        prompt = tuple(replace(t, train_on=False) if t.role == "assistant" else t for t in prompt)
        answer = tuple(replace(t, train_on=True) if t.role == "assistant" else t for t in answer)
    return Chat((*prompt, *answer), to_tools(row_fields.get("tools")))


def _answer_turns(row_fields: RowFields, role: str) -> Turns:
    """The messages of a cell, or its text as one turn of the assistant."""
    value = _messages_or_text(row_fields, role)
    if isinstance(value, list):
        return _unflagged(to_turns(value))
    return (Turn({"role": "assistant", "content": answer_text(row_fields, role)}),)


def _prompt_turns(row_fields: RowFields, without: str = NO_PROMPT) -> Turns:
    """without: what is said where there is none."""
    value = _messages_or_text(row_fields, "prompt")
    if not isinstance(value, list):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(without)
        return _text_turns(row_fields, instruction_text(row_fields, "prompt"))
    return _with_system(row_fields, _unflagged(to_turns(value)))


def _with_system(row_fields: RowFields, turns: Turns) -> Turns:
    system = optional_text(row_fields, "system")
    return Chat(turns).with_system(system).turns if system and turns else turns


def _text_turns(row_fields: RowFields, text: str) -> Turns:
    system = optional_text(row_fields, "system")
    turns = [
        *([Turn({"role": "system", "content": system})] if system else []),
        Turn({"role": "user", "content": text}),
    ]
    return tuple(turns)


def _messages_or_text(row_fields: RowFields, role: str) -> Any:
    """A cell's list of messages, perhaps written as JSON; anything else as it is."""
    value = row_fields.get(role)
    if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
        return parse_cell(value, role)
    return required_list(row_fields, role) if isinstance(value, list) else value


def _unflagged(turns: Sequence[Turn]) -> Turns:
    """Which turns the data flag as trained on does not matter here: the answer is."""
    return tuple(replace(turn, train_on=None) for turn in turns)


def _num_shared(chosen: Turns, rejected: Turns) -> int:
    pairs = zip(chosen, rejected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))


def _raw_text(row_fields: RowFields, role: str, may_be_empty: bool = False) -> str:
    value = row_fields.get(role)
    if isinstance(value, list | dict):
        raise DataError(f"{role!r} is {shorten_cell(value)}, expected a string: messages are read without raw_")
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise DataError(f"{role!r} is {shorten_cell(value)}, expected text")
    return value


def _margin(value: Any) -> float:
    """0 where a cell is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return 0.0
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"'margin' is {shorten_cell(value)}, expected a number")
    return margin


def _is_desirable(row_fields: RowFields) -> bool:
    value = row_fields.get("label")
    word = " ".join(value.lower().replace("_", " ").split()) if isinstance(value, str) else value
    if isinstance(word, str):
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        try:
            word = float(word)
        except ValueError:
            word = None
    if isinstance(word, bool | int | float) and word in (0, 1):
        return bool(word)
    raise DataError(
        f"'label' is {shorten_cell(value)}, expected whether the answer is wanted: true or false, 1 or 0, yes or no, "
        "good or bad, desirable or undesirable, chosen or rejected"
    )
