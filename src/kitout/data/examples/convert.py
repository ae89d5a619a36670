"""One row as one example, a function per format: instructions, chats, completions, questions, labels, tags.

A function gets its cells by role ("instruction", "context", ...) and raises a DataError that names the cell and its
value; the caller adds the line. Types and shapes decide, never the text itself. It knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from kitout.data.examples.bio_tags import bio_tags
from kitout.data.examples.examples import (
    Chat,
    Completion,
    Label,
    LabeledImage,
    LabeledText,
    TaggedWords,
    Text,
    Turn,
    cell_to_text,
)
from kitout.data.read.json_text import parse_json
from kitout.data.read.tables import DataError
from kitout.errors import suggest
from kitout.format import short_repr

RowFields: TypeAlias = Mapping[str, Any]  # role -> value; roles that the row leaves empty are None

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
TRAIN_FLAGS = ("learn", "train", "training", "weight")  # what data sets call the flag that a turn is trained on
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # what data sets call the reasoning before an answer
SUMMARIZE_PROMPT = "Summarise this text."
UNANSWERABLE = "unanswerable"  # what is answered where a passage does not hold the answer
UNANSWERABLE_REMARK = f"no answer is in the passage; {UNANSWERABLE!r} is trained on as the answer"
STRIPPED_LABEL_REMARK = "white space around the label is left out"


def from_instruction(row_fields: RowFields) -> Chat:
    """An instruction, perhaps with a context, as alpaca and dolly have them."""
    instruction = _required_text(row_fields, "instruction")
    context = _optional_text(row_fields, "context")
    return one_turn_chat(
        f"{instruction}\n\n{context}" if context else instruction,
        _answer_text(row_fields, "response"),
        _optional_text(row_fields, "system"),
    )


def from_messages(row_fields: RowFields, role: str = "messages") -> Chat:
    """Messages as OpenAI (role, content) and sharegpt (from, value) have them."""
    turns = _to_turns(_required_list(row_fields, role))
    system = _optional_text(row_fields, "system")
    chat = Chat(turns, _to_tools(row_fields.get("tools")))
    return chat.with_system(system) if system else chat


def from_sharegpt(row_fields: RowFields) -> Chat:
    return from_messages(row_fields, "conversations")


def from_completion(row_fields: RowFields) -> Chat | Completion:
    """Raw strings, or the messages of a conversation and those of its continuation."""
    prompt, completion = row_fields.get("prompt"), row_fields.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = [*_to_turns(_required_list(row_fields, "prompt"))]
        messages += _to_turns(_required_list(row_fields, "completion"))
        return Chat(tuple(messages), _to_tools(row_fields.get("tools")))
    if not isinstance(completion, str) or not completion:
        raise DataError(f"'completion' is {completion!r}, expected text")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"'prompt' is {_shorten(prompt)}, expected text")
    return Completion(prompt or "", completion)


def from_question(row_fields: RowFields) -> Chat:
    """A question, perhaps about a passage, perhaps with choices. Of several answers the first is taken."""
    question = _required_text(row_fields, "question")
    answer = row_fields.get("answer")
    if isinstance(answer, Mapping):  # as SQuAD has it: {"text": [...], "answer_start": [...]}
        answer = answer.get("text")
    passage = _optional_text(row_fields, "context")
    remarks: tuple[str, ...] = ()
    if isinstance(answer, list):
        if not answer and passage:  # as SQuAD 2.0 has questions without an answer
            answer, remarks = [UNANSWERABLE], (UNANSWERABLE_REMARK,)
        answer = answer[0] if answer else None
    if row_fields.get("choices") is not None:
        choices, answer = _letter_choices(row_fields["choices"], answer)
        question = "\n".join([question, *choices])
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    answer = _answer_text({"answer": answer}, "answer")
    prompt = f"{passage}\n\n{question}" if passage else question
    return replace(one_turn_chat(prompt, answer, _optional_text(row_fields, "system")), remarks=remarks)


def from_summary(row_fields: RowFields) -> Chat:
    """A document and its summary. The request comes after the document, where truncation spares it."""
    return one_turn_chat(
        f"{_required_text(row_fields, 'document')}\n\n{SUMMARIZE_PROMPT}",
        _answer_text(row_fields, "summary"),
        _optional_text(row_fields, "system"),
    )


def from_label(row_fields: RowFields) -> LabeledText:
    """One class, one number, or a list of the labels that apply (empty: none does)."""
    text_pair, label = _optional_text(row_fields, "second") or None, row_fields.get("label")
    remarks = (STRIPPED_LABEL_REMARK,) if isinstance(label, str) and label != label.strip() else ()
    return LabeledText(_required_text(row_fields, "text"), _to_label(label), text_pair, remarks=remarks)


def from_tokens(row_fields: RowFields) -> TaggedWords:
    words, tags = _required_list(row_fields, "tokens"), _required_list(row_fields, "tags")
    if len(words) != len(tags):
        raise DataError(f"{len(words)} tokens and {len(tags)} tags; each token needs one tag")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise DataError(f"'tokens' has an element that is not a word: {_shorten(words)}")
    if any(tag is None or isinstance(tag, list | dict) for tag in tags):
        raise DataError(f"'tags' has an element that is not a tag: {_shorten(tags)}")
    return TaggedWords(tuple(words), tuple(map(cell_to_text, tags)))


def from_spans(row_fields: RowFields) -> TaggedWords:
    """A text and its labeled spans, in characters: {"start": 0, "end": 5, "label": "PER"}."""
    spans = row_fields.get("spans")
    if isinstance(spans, str):
        spans = _parse_json(spans, "spans")
    if not isinstance(spans, list):
        raise DataError(f"'spans' is {_shorten(spans)}, expected a list (empty if there are none)")
    text = _required_text(row_fields, "text", strip=False)
    words, tags, starts = bio_tags(text, spans)
    return TaggedWords(words, tags, text=text, starts=starts)


def from_text(row_fields: RowFields) -> Text:
    return Text(_required_text(row_fields, "text", strip=False))


def from_image(row_fields: RowFields) -> LabeledImage:
    image, label = row_fields.get("image"), _required_text(row_fields, "label")
    if isinstance(image, bytes):
        return LabeledImage("", label, image)
    return LabeledImage(_required_text(row_fields, "image"), label)


def one_turn_chat(prompt: str, answer: str, system_prompt: str = "") -> Chat:
    """One question and its answer as a chat."""
    turns = [("system", system_prompt), ("user", prompt), ("assistant", answer)]
    return Chat(tuple(Turn({"role": role, "content": text}) for role, text in turns if role != "system" or text))


def _to_turns(messages: Sequence[Any]) -> tuple[Turn, ...]:
    return tuple(_to_turn(message, number) for number, message in enumerate(messages, start=1))


def _to_turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"turn {number} is {_shorten(message)}, expected an object with role and content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"turn {number} is by {_shorten(role)}; {suggest(str(role)[:80], ROLES)}")
    content = message.get("content", message.get("value"))
    fields: dict[str, Any] = {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("role", "from", "content", "value", *TRAIN_FLAGS)
    }
    if role == "function_call":  # as sharegpt has one call, or a list of them
        fields["tool_calls"], content = _as_list(_parse_json(content, f"turn {number}")), None
    calls = fields.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise DataError(f"turn {number}: 'tool_calls' is {_shorten(calls)}, expected a list")
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
        raise DataError(f"turn {number} holds {_shorten(content)}; only text can be trained on")
    return cell_to_text(content)


def _to_tool_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call as templates take it: arguments as an object, not as JSON text as in OpenAI's API."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise DataError(f"turn {number} calls a tool without a name: {_shorten(call)}")
    function = _without_nulls(function)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", f"turn {number}, the arguments of {function['name']}")
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
                raise DataError(f"turn {number}: {name!r} is {_shorten(value)}, expected true or false (1 or 0)")
            return bool(value)
    return None


def _to_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """A list of schemas, or one; each as an object or as JSON text."""
    tools = _parse_json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    schemas = [_parse_json(tool, "tools") for tool in _as_list(tools)]
    if not all(isinstance(tool, Mapping) for tool in schemas):
        raise DataError(f"'tools' is {_shorten(tools)}, expected a list of JSON schemas")
    return tuple(_without_nulls(tool) for tool in schemas)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _without_nulls(value: Any) -> Any:
    """Keys without a value are absent: a table of parquet gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _letter_choices(choices: Any, answer: Any) -> tuple[list[str], Any]:
    """The choices as lettered lines, and the text of the correct one. answer: its index, its letter, or its text."""
    names: Sequence[Any] | None = None
    if isinstance(choices, str) and choices.lstrip().startswith(("[", "{")):
        choices = _parse_json(choices, "choices")
    if isinstance(choices, Mapping):  # as ARC has it: {"text": [...], "label": ["A", ...]}
        names, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"'choices' is {_shorten(choices)}, expected a list")
    texts = [cell_to_text(choice) for choice in choices]
    if names and (not isinstance(names, list) or len(names) != len(texts)):
        raise DataError(f"the names of the choices are {_shorten(names)}, expected one for each of the {len(texts)}")
    letters = [str(name) for name in names] if names else [chr(ord("A") + i) for i in range(len(texts))]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)]
    if isinstance(answer, int) and not isinstance(answer, bool) and not names:
        if 0 <= answer < len(texts):
            return lines, texts[answer]
    elif str(answer) in texts:
        return lines, str(answer)
    elif str(answer) in letters:
        return lines, texts[letters.index(str(answer))]
    elif isinstance(answer, str) and answer.strip() in map(str, range(len(texts))) and not names:
        return lines, texts[int(answer)]  # a table without types holds the number as text
    raise DataError(
        f"'answer' is {_shorten(answer)}, none of the {len(texts)} choices, their letters or their numbers from 0"
    )


def _to_label(value: Any) -> Label:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value, "label")
    if isinstance(value, list):
        if any(v is None or isinstance(v, list | dict) or v == "" for v in value):
            raise DataError(f"'label' is {_shorten(value)}, expected a list of labels")
        return tuple(sorted({cell_to_text(v).strip() for v in value}))
    if value is None or isinstance(value, dict) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"'label' is {_shorten(value)}, expected a label")
    if isinstance(value, bool):
        return cell_to_text(value)
    return value if isinstance(value, int | float) else cell_to_text(value).strip()


def _required_text(row_fields: RowFields, role: str, strip: bool = True) -> str:
    value = row_fields.get(role)
    if value is None or isinstance(value, list | dict) or not cell_to_text(value).strip():
        raise DataError(f"{role!r} is {_shorten(value)}, expected text")
    return cell_to_text(value).strip() if strip else cell_to_text(value)


def _answer_text(row_fields: RowFields, role: str) -> str:
    """An answer keeps the white space it begins with: indentation is a part of code."""
    return _required_text(row_fields, role, strip=False).rstrip()


def _optional_text(row_fields: RowFields, role: str) -> str:
    """The text of a cell that may be empty; a list of passages counts as one text."""
    value = row_fields.get(role)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if value is None or not cell_to_text(value).strip():
        return ""
    return _required_text({**row_fields, role: value}, role)


def _required_list(row_fields: RowFields, role: str) -> list[Any]:
    value = row_fields.get(role)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value, role)
    if not isinstance(value, list) or not value:
        raise DataError(f"{role!r} is {_shorten(value)}, expected a list that is not empty")
    return value


def _parse_json(text: Any, description: str) -> Any:
    try:
        return parse_json(text) if isinstance(text, str) else text
    except DataError as error:
        raise DataError(f"{description}: {error}: {_shorten(text)}") from error


def _shorten(value: object) -> str:
    return "empty" if value is None or value == "" else short_repr(value, 60)
