"""One row as one example, a function per format: instructions, chats, completions, questions, labels, tags.

A function gets its cells by role ("instruction", "context", ...) and raises a DataError that names the cell and its
value; the caller adds the line. Types and shapes decide, never the text itself. It knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kitout.data.examples.bio_tags import bio_tags
from kitout.data.examples.cells import (
    RowFields,
    answer_text,
    optional_text,
    parse_cell,
    required_list,
    required_text,
    shorten_cell,
)
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
from kitout.data.examples.turns import to_tools, to_turns
from kitout.data.read.tables import DataError

SUMMARIZE_PROMPT = "Summarise this text."
UNANSWERABLE = "unanswerable"  # what is answered where a passage does not hold the answer
UNANSWERABLE_REMARK = f"no answer is in the passage; {UNANSWERABLE!r} is trained on as the answer"
STRIPPED_LABEL_REMARK = "white space around the label is left out"


def from_instruction(row_fields: RowFields) -> Chat:
    """An instruction, perhaps with a context, as alpaca and dolly have them."""
    return one_turn_chat(
        instruction_text(row_fields, "instruction"),
        answer_text(row_fields, "response"),
        optional_text(row_fields, "system"),
    )


def from_messages(row_fields: RowFields, role: str = "messages") -> Chat:
    """Messages as OpenAI (role, content) and sharegpt (from, value) have them."""
    turns = to_turns(required_list(row_fields, role))
    system = optional_text(row_fields, "system")
    chat = Chat(turns, to_tools(row_fields.get("tools")))
    return chat.with_system(system) if system else chat


def from_sharegpt(row_fields: RowFields) -> Chat:
    return from_messages(row_fields, "conversations")


def from_completion(row_fields: RowFields) -> Chat | Completion:
    """Raw strings, or the messages of a conversation and those of its continuation."""
    prompt, completion = row_fields.get("prompt"), row_fields.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = [*to_turns(required_list(row_fields, "prompt"))]
        messages += to_turns(required_list(row_fields, "completion"))
        return Chat(tuple(messages), to_tools(row_fields.get("tools")))
    if not isinstance(completion, str) or not completion:
        raise DataError(f"'completion' is {completion!r}, expected text")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"'prompt' is {shorten_cell(prompt)}, expected text")
    return Completion(prompt or "", completion)


def from_question(row_fields: RowFields) -> Chat:
    """A question, perhaps about a passage, perhaps with choices. Of several answers the first is taken."""
    question, answer = question_text(row_fields), row_fields.get("answer")
    if isinstance(answer, Mapping):  # as SQuAD has it: {"text": [...], "answer_start": [...]}
        answer = answer.get("text")
    passage = optional_text(row_fields, "context")
    remarks: tuple[str, ...] = ()
    if isinstance(answer, list):
        if not answer and passage:  # as SQuAD 2.0 has questions without an answer
            answer, remarks = [UNANSWERABLE], (UNANSWERABLE_REMARK,)
        answer = answer[0] if answer else None
    if row_fields.get("choices") is not None:
        answer = _chosen_text(row_fields["choices"], answer)
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    answer = answer_text({"answer": answer}, "answer")
    return replace(one_turn_chat(question, answer, optional_text(row_fields, "system")), remarks=remarks)


def from_summary(row_fields: RowFields) -> Chat:
    """A document and its summary. The request comes after the document, where truncation spares it."""
    return one_turn_chat(
        f"{required_text(row_fields, 'document')}\n\n{SUMMARIZE_PROMPT}",
        answer_text(row_fields, "summary"),
        optional_text(row_fields, "system"),
    )


def from_label(row_fields: RowFields) -> LabeledText:
    """One class, one number, or a list of the labels that apply (empty: none does)."""
    text_pair, label = optional_text(row_fields, "second") or None, row_fields.get("label")
    remarks = (STRIPPED_LABEL_REMARK,) if isinstance(label, str) and label != label.strip() else ()
    return LabeledText(required_text(row_fields, "text"), _to_label(label), text_pair, remarks=remarks)


def from_tokens(row_fields: RowFields) -> TaggedWords:
    words, tags = required_list(row_fields, "tokens"), required_list(row_fields, "tags")
    if len(words) != len(tags):
        raise DataError(f"{len(words)} tokens and {len(tags)} tags; each token needs one tag")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise DataError(f"'tokens' has an element that is not a word: {shorten_cell(words)}")
    if any(tag is None or isinstance(tag, list | dict) for tag in tags):
        raise DataError(f"'tags' has an element that is not a tag: {shorten_cell(tags)}")
    return TaggedWords(tuple(words), tuple(map(cell_to_text, tags)))


def from_spans(row_fields: RowFields) -> TaggedWords:
    """A text and its labeled spans, in characters: {"start": 0, "end": 5, "label": "PER"}."""
    spans = row_fields.get("spans")
    if isinstance(spans, str):
        spans = parse_cell(spans, "spans")
    if not isinstance(spans, list):
        raise DataError(f"'spans' is {shorten_cell(spans)}, expected a list (empty if there are none)")
    text = required_text(row_fields, "text", strip=False)
    words, tags, starts = bio_tags(text, spans)
    return TaggedWords(words, tags, text=text, starts=starts)


def from_text(row_fields: RowFields) -> Text:
    return Text(required_text(row_fields, "text", strip=False))


def from_image(row_fields: RowFields) -> LabeledImage:
    image, label = row_fields.get("image"), required_text(row_fields, "label")
    if isinstance(image, bytes):
        return LabeledImage("", label, image)
    return LabeledImage(required_text(row_fields, "image"), label)


def instruction_text(row_fields: RowFields, role: str) -> str:
    """What is asked, with its context behind it."""
    instruction, context = required_text(row_fields, role), optional_text(row_fields, "context")
    return f"{instruction}\n\n{context}" if context else instruction


def question_text(row_fields: RowFields) -> str:
    """The question behind its passage, with its choices as lettered lines."""
    question, passage = required_text(row_fields, "question"), optional_text(row_fields, "context")
    if row_fields.get("choices") is not None:
        texts, letters, _ = _read_choices(row_fields["choices"])
        question = "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))])
    return f"{passage}\n\n{question}" if passage else question


def one_turn_chat(prompt: str, answer: str, system_prompt: str = "") -> Chat:
    """One question and its answer as a chat."""
    turns = [("system", system_prompt), ("user", prompt), ("assistant", answer)]
    return Chat(tuple(Turn({"role": role, "content": text}) for role, text in turns if role != "system" or text))


def _read_choices(choices: Any) -> tuple[list[str], list[str], bool]:
    """The text of each choice, its letter, and whether the data name the letters."""
    names: Sequence[Any] | None = None
    if isinstance(choices, str) and choices.lstrip().startswith(("[", "{")):
        choices = parse_cell(choices, "choices")
    if isinstance(choices, Mapping):  # as ARC has it: {"text": [...], "label": ["A", ...]}
        names, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"'choices' is {shorten_cell(choices)}, expected a list")
    texts = [cell_to_text(choice) for choice in choices]
    if names and (not isinstance(names, list) or len(names) != len(texts)):
        raise DataError(
            f"the names of the choices are {shorten_cell(names)}, expected one for each of the {len(texts)}"
        )
    letters = [str(name) for name in names] if names else [chr(ord("A") + i) for i in range(len(texts))]
    return texts, letters, bool(names)


def _chosen_text(choices: Any, answer: Any) -> str:
    """The text of the correct choice. answer: its index, its letter, or its text."""
    texts, letters, names = _read_choices(choices)
    if isinstance(answer, int) and not isinstance(answer, bool) and not names:
        if 0 <= answer < len(texts):
            return texts[answer]
    elif str(answer) in texts:
        return str(answer)
    elif str(answer) in letters:
        return texts[letters.index(str(answer))]
    elif isinstance(answer, str) and answer.strip() in map(str, range(len(texts))) and not names:
        return texts[int(answer)]  # a table without types holds the number as text
    raise DataError(
        f"'answer' is {shorten_cell(answer)}, none of the {len(texts)} choices, their letters or their numbers from 0"
    )


def _to_label(value: Any) -> Label:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_cell(value, "label")
    if isinstance(value, list):
        if any(v is None or isinstance(v, list | dict) or v == "" for v in value):
            raise DataError(f"'label' is {shorten_cell(value)}, expected a list of labels")
        return tuple(sorted({cell_to_text(v).strip() for v in value}))
    if value is None or isinstance(value, dict) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"'label' is {shorten_cell(value)}, expected a label")
    if isinstance(value, bool):
        return cell_to_text(value)
    return value if isinstance(value, int | float) else cell_to_text(value).strip()
