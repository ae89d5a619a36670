"""The cells of one row as an example, one function per format: alpaca, chats, completions, questions, labels, tags.

A function gets its cells by role ("instruction", "context", ...) and raises a DataError that says which cell holds
what; the caller knows the line. Nothing is guessed from words: shapes and types decide. It knows no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from kitout.data.examples.bio_tags import words_and_tags
from kitout.data.examples.examples import (
    Chat,
    Completion,
    Example,
    Label,
    LabeledImage,
    Labelled,
    Tagged,
    Text,
    Turn,
    shown,
)
from kitout.data.read.tables import DataError
from kitout.errors import suggest

Cells: TypeAlias = Mapping[str, Any]  # role -> value; roles that the row leaves empty are None

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
LEARN = ("learn", "train", "training", "weight")  # what data sets call the flag of a turn
SUMMARISE = "Summarise this text."


def instruction(cells: Cells) -> Chat:
    """What to do and perhaps what with, as alpaca and dolly write it."""
    asked = _text(cells, "instruction")
    given = _spare(cells, "context")
    return single(f"{asked}\n\n{given}" if given else asked, _text(cells, "response"), _spare(cells, "system"))


def chat(cells: Cells, role: str = "messages") -> Chat:
    """OpenAI's messages (role, content) and sharegpt's (from, value)."""
    turns = _turns(_listed(cells, role))
    system = _spare(cells, "system")
    if system and turns[0].role != "system":
        turns = (Turn({"role": "system", "content": system}), *turns)
    return Chat(turns, _tools(cells.get("tools")))


def sharegpt(cells: Cells) -> Chat:
    return chat(cells, "conversations")


def completion(cells: Cells) -> Chat | Completion:
    """Raw strings, or message lists of a conversation and its end."""
    prompt, answer = cells.get("prompt"), cells.get("completion")
    if isinstance(prompt, list) or isinstance(answer, list):
        asked = _turns(_listed(cells, "prompt"))
        return Chat((*asked, *_turns(_listed(cells, "completion"))), _tools(cells.get("tools")))
    if not isinstance(answer, str) or not answer:
        raise DataError(f"'completion' is {answer!r}, expected text")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"'prompt' is {_short(prompt)}, expected text")
    return Completion(prompt or "", answer)


def question(cells: Cells) -> Chat:
    """A question, perhaps about a passage, perhaps with choices; the first of several answers is learnt."""
    asked = _text(cells, "question")
    answer = cells.get("answer")
    if isinstance(answer, Mapping):  # as SQuAD has it: {"text": [...], "answer_start": [...]}
        answer = answer.get("text")
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    if cells.get("choices") is not None:
        choices, answer = _chosen(cells["choices"], answer)
        asked = "\n".join([asked, *choices])
    said = ("yes" if answer else "no") if isinstance(answer, bool) else _text({"answer": answer}, "answer")
    passage = _spare(cells, "context")
    return single(f"{passage}\n\n{asked}" if passage else asked, said, _spare(cells, "system"))


def summary(cells: Cells) -> Chat:
    """A document and its summary; the request stands behind the document, where truncation spares it."""
    return single(f"{_text(cells, 'document')}\n\n{SUMMARISE}", _text(cells, "summary"), _spare(cells, "system"))


def label(cells: Cells) -> Labelled:
    """One class, one number, or a list of the labels that apply (an empty list: none does)."""
    second = _spare(cells, "second") or None
    return Labelled(_text(cells, "text"), _label(cells.get("label")), second)


def tokens(cells: Cells) -> Tagged:
    words, tags = _listed(cells, "tokens"), _listed(cells, "tags")
    if len(words) != len(tags):
        raise DataError(f"{len(words)} tokens and {len(tags)} tags; each token needs one tag")
    if not all(isinstance(w, str) and w.strip() for w in words):
        raise DataError(f"'tokens' holds what is no word: {_short(words)}")
    if any(tag is None or isinstance(tag, list | dict) for tag in tags):
        raise DataError(f"'tags' holds what is no tag: {_short(tags)}")
    return Tagged(tuple(words), tuple(map(shown, tags)))


def spans(cells: Cells) -> Tagged:
    """A text and the marked stretches of it: {"start": 0, "end": 5, "label": "PER"} in characters."""
    marked = cells.get("spans")
    if isinstance(marked, str):
        marked = _parsed(marked, "spans")
    if not isinstance(marked, list):
        raise DataError(f"'spans' is {_short(marked)}, expected a list (an empty one where nothing is marked)")
    return Tagged(*words_and_tags(_text(cells, "text", strip=False), marked))


def plain(cells: Cells) -> Text:
    return Text(_text(cells, "text", strip=False))


def image(cells: Cells) -> LabeledImage:
    return LabeledImage(_text(cells, "image"), _text(cells, "label"))


def instructed(example: Example, words: str) -> Chat:
    """A chat with these words as its system turn; a labelled text becomes one, its label the answer."""
    if isinstance(example, Labelled):
        answer = example.answer_text() or "none"
        return single(example.source_text(), answer, words)
    if isinstance(example, Chat):
        if example.turns[0].role == "system":
            return example
        return Chat((Turn({"role": "system", "content": words}), *example.turns), example.tools)
    raise DataError(
        f"an instruction goes with chats and labelled texts; this is a {type(example).__name__.lower()} example, "
        "which is learnt as it stands: leave the instruction out"
    )


def single(asked: str, said: str, system: str = "") -> Chat:
    """One question and its answer as a chat."""
    turns = [("system", system), ("user", asked), ("assistant", said)]
    return Chat(tuple(Turn({"role": role, "content": text}) for role, text in turns if role != "system" or text))


def _turns(messages: Sequence[Any]) -> tuple[Turn, ...]:
    return tuple(_turn(message, number) for number, message in enumerate(messages, start=1))


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"turn {number} is {_short(message)}, expected an object with role and content")
    role = message.get("role", message.get("from"))
    if role not in ROLES:
        raise DataError(f"turn {number} is by {role!r}; {suggest(str(role), ROLES)}")
    content = message.get("content", message.get("value"))
    kept = {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("role", "from", "content", "value", *LEARN)
    }
    if role == "function_call":
        kept, content = {"tool_calls": [_parsed(content, f"turn {number}")]}, None
    calls = [_call(call, number) for call in kept.pop("tool_calls", None) or ()]
    words = _joined(content, number)
    if not words.strip() and not calls:
        raise DataError(f"turn {number} ({role}) is empty")
    made: dict[str, Any] = {"role": ROLES[role], "content": words, **kept}
    if calls:
        made["tool_calls"] = calls
    return Turn(made, _flag(message, number))


def _joined(content: Any, number: int) -> str:
    """OpenAI's content is a string, nothing beside tool calls, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, list | dict):
        raise DataError(f"turn {number} holds {_short(content)}; only text can be learnt here")
    return shown(content)


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call as templates take it: arguments as an object, not as the JSON text that OpenAI's API sends."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise DataError(f"turn {number} calls a tool without a name: {_short(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"turn {number}, the arguments of {function['name']}")
    ids = {"id": call["id"]} if call.get("id") is not None else {}
    return {**ids, "type": "function", "function": {**function, "arguments": arguments}}


def _flag(message: Mapping[str, Any], number: int) -> bool | None:
    for name in LEARN:
        value = message.get(name)
        if value is not None:
            if value not in (0, 1):
                raise DataError(f"turn {number}: {name!r} is {value!r}, expected true or false (1 or 0)")
            return bool(value)
    return None


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    tools = _parsed(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"'tools' is {_short(tools)}, expected a list of JSON schemas")
    return tuple(tools)


def _chosen(choices: Any, answer: Any) -> tuple[list[str], Any]:
    """The choices as lettered lines, and the right one's words. answer: its index, its letter or label, or itself."""
    names: Sequence[Any] | None = None
    if isinstance(choices, Mapping):  # as ARC has it: {"text": [...], "label": ["A", ...]}
        names, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"'choices' is {_short(choices)}, expected a list")
    words = [shown(choice) for choice in choices]
    letters = [str(name) for name in names] if names else [chr(ord("A") + i) for i in range(len(words))]
    lines = [f"{letter}. {said}" for letter, said in zip(letters, words, strict=False)]
    if isinstance(answer, int) and not isinstance(answer, bool) and not names:
        if 0 <= answer < len(words):
            return lines, words[answer]
    elif str(answer) in words:
        return lines, str(answer)
    elif str(answer) in letters:
        return lines, words[letters.index(str(answer))]
    raise DataError(f"'answer' is {answer!r}, none of the {len(words)} choices, their letters or their numbers from 0")


def _label(value: Any) -> Label:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, "label")
    if isinstance(value, list):
        if any(v is None or isinstance(v, list | dict) or v == "" for v in value):
            raise DataError(f"'label' is {_short(value)}, expected a list of labels")
        return tuple(sorted({shown(v).strip() for v in value}))
    if value is None or isinstance(value, dict) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"'label' is {_short(value)}, expected a label")
    if isinstance(value, bool):
        return shown(value)
    return value if isinstance(value, int | float) else str(value).strip()


def _text(cells: Cells, role: str, strip: bool = True) -> str:
    value = cells.get(role)
    if value is None or isinstance(value, list | dict) or not shown(value).strip():
        raise DataError(f"{role!r} is {_short(value)}, expected text")
    return shown(value).strip() if strip else shown(value)


def _spare(cells: Cells, role: str) -> str:
    """The text of a cell that may be empty; a list of passages counts as one text."""
    value = cells.get(role)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    return "" if value is None else _text(cells | {role: value}, role) if shown(value).strip() else ""  # type: ignore[operator]


def _listed(cells: Cells, role: str) -> list[Any]:
    value = cells.get(role)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, role)
    if not isinstance(value, list) or not value:
        raise DataError(f"{role!r} is {_short(value)}, expected a list with something in it")
    return value


def _parsed(words: Any, what: str) -> Any:
    try:
        return json.loads(words) if isinstance(words, str) else words
    except json.JSONDecodeError as wrong:
        raise DataError(f"{what}: not JSON ({wrong.msg}, column {wrong.colno}): {_short(words)}") from wrong


def _short(value: object) -> str:
    words = "empty" if value is None or value == "" else repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
