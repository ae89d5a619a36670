"""Messages as data sets have them (OpenAI, sharegpt, with tools and train flags) as the turns of a chat.

Types and shapes decide, never the text itself; what is no turn is a DataError that names its number and what it is. It
knows no file, no format and no template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kitout.data.examples.cells import parse_cell, shorten_cell
from kitout.data.examples.examples import Turn, cell_to_text
from kitout.data.read.tables import DataError
from kitout.errors import suggest

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
TRAIN_FLAGS = ("learn", "train", "training", "weight")  # what data sets call the flag that a turn is trained on
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # what data sets call the reasoning before an answer


def to_turns(messages: Sequence[Any]) -> tuple[Turn, ...]:
    return tuple(_to_turn(message, number) for number, message in enumerate(messages, start=1))


def _to_turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"turn {number} is {shorten_cell(message)}, expected an object with role and content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"turn {number} is by {shorten_cell(role)}; {suggest(str(role)[:80], ROLES)}")
    content = message.get("content", message.get("value"))
    fields: dict[str, Any] = {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("role", "from", "content", "value", *TRAIN_FLAGS)
    }
    if role == "function_call":  # as sharegpt has one call, or a list of them
        fields["tool_calls"], content = _as_list(parse_cell(content, f"turn {number}")), None
    calls = fields.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise DataError(f"turn {number}: 'tool_calls' is {shorten_cell(calls)}, expected a list")
    if "function_call" in fields:  # as OpenAI had it before tools
        calls = [*calls, fields.pop("function_call")]
    calls = [_to_tool_call(call, number) for call in calls]
    text = _content_text(content, number)
    has_reasoning = any(str(fields.get(key, "")).strip() for key in REASONING_KEYS)
    if not text.strip() and not calls and not has_reasoning and ROLES[role] != "system":
        raise DataError(f"turn {number} ({role}) is empty")
    if calls:
        fields["tool_calls"] = calls
    return Turn({"role": ROLES[role], "content": text, **fields}, _train_flag(message, number))


def _content_text(content: Any, number: int) -> str:
    """The content of a message: a string, nothing beside tool calls, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(cell_to_text(part["text"]) for part in content if part.get("text") is not None)
    if isinstance(content, list | dict):
        raise DataError(f"turn {number} holds {shorten_cell(content)}; only text can be trained on")
    return cell_to_text(content)


def _to_tool_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call as templates take it: arguments as an object, not as JSON text as in OpenAI's API."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise DataError(f"turn {number} calls a tool without a name: {shorten_cell(call)}")
    function = _without_nulls(function)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_cell(arguments or "{}", f"turn {number}, the arguments of {function['name']}")
    ids = {"id": call["id"]} if call.get("id") is not None else {}
    others = {} if "function" not in call else _without_nulls(
        {key: value for key, value in call.items() if key not in ("id", "type", "function")}
    )  # fmt: skip
    return {**ids, "type": "function", "function": {**function, "arguments": arguments}, **others}


def _train_flag(message: Mapping[str, Any], number: int) -> bool | None:
    for name in TRAIN_FLAGS:
        value = message.get(name)
        if value is not None:
            if value not in (0, 1):
                raise DataError(f"turn {number}: {name!r} is {shorten_cell(value)}, expected true or false (1 or 0)")
            return bool(value)
    return None


def to_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """A list of schemas, or one; each as an object or as JSON text."""
    tools = parse_cell(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    schemas = [parse_cell(tool, "tools") for tool in _as_list(tools)]
    if not all(isinstance(tool, Mapping) for tool in schemas):
        raise DataError(f"'tools' is {shorten_cell(tools)}, expected a list of JSON schemas")
    return tuple(_without_nulls(tool) for tool in schemas)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _without_nulls(value: Any) -> Any:
    """Keys without a value are absent: a table of parquet gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
