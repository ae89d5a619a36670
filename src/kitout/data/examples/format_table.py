"""The table of formats: the roles of a table's columns, their usual names, and what makes an example of them.

A new format is one entry. Which of them a table has is decided in `formats`; which a caller can use it says by their
kind. It knows no file, no tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kitout.data.examples import convert, convert_answers
from kitout.data.examples.cells import RowFields
from kitout.data.examples.examples import Example

ColumnNames: TypeAlias = "Mapping[str, tuple[str, ...]]"  # role -> its usual column names, the first one present wins

# What examples are for: `kitout train` takes the first kind, alignment the others.
Kind: TypeAlias = Literal["training", "preference", "unpaired", "prompts"]
KINDS: dict[str, str] = {
    "training": "texts to train on",
    "preference": "pairs of a chosen and a rejected answer",
    "unpaired": "answers with a label that says whether each is wanted",
    "prompts": "prompts",
}
STAGES = {"training": "sft", "preference": "dpo", "unpaired": "kto", "prompts": "grpo"}  # what takes each, of `align`
_SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system", "system_prompt")}
_TOOLS: dict[str, tuple[str, ...]] = {"tools": ("tools", "functions")}
_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "score")
_TEXTS = (
    "text", "sentence", "sentence1", "premise", "text1", "question1", "tweet", "review", "comment", "content", "body",
)  # fmt: skip
_PASSAGES = ("context", "passage", "paragraph", "article", "body")
_PROMPTS = ("prompt", "question", "instruction", "problem", "query", "input")
_CONTEXT: dict[str, tuple[str, ...]] = {"context": ("input", "context")}
_CHOSEN = ("chosen", "chosen_response", "response_chosen")
_REJECTED = ("rejected", "rejected_response", "response_rejected")
_COMPLETIONS = ("completion", "response", "answer", "output")
_WANTED = ("label", "desirable", "is_desirable", "feedback")
_MARGIN: dict[str, tuple[str, ...]] = {"margin": ("margin",)}


@dataclass(frozen=True)
class Format:
    """Columns by role, and what makes an example of them."""

    name: str
    """As `format=` names it."""
    required: ColumnNames
    """Roles that a table must have."""
    to_example: Callable[[RowFields], Example]
    """One row, by role, as an example."""
    answer: str = ""
    """The role that is predicted; "" where it is part of the input's own column, or nothing is. The first required role
    is the input that a plain text stands for."""
    optional: ColumnNames = field(default_factory=dict)
    """Roles that a table may have."""
    detected: Literal["always", "if_wanted", "never"] = "always"
    """Whether its columns are enough. if_wanted: only where the caller asks for its kind, since other tables may have
    them too; never: it must be named."""
    kind: Kind = "training"
    """What its examples are for."""
    variant_of: str = ""
    """The format by whose name it is taken as well, where that one does not fit."""
    keeps_row: bool = False
    """Whether its examples keep all columns."""

    @property
    def by_name_only(self) -> bool:
        """Not detected unless its kind is asked for."""
        return self.detected != "always"

    @property
    def roles(self) -> ColumnNames:
        """Required and optional ones."""
        return {**self.required, **self.optional}

    def __str__(self) -> str:
        optional = f"; optional {', '.join(self.optional)}" if self.optional else ""
        required = ["/".join(names[:3]) + ("/..." if len(names) > 3 else "") for names in self.required.values()]
        return f"{self.name}: {' and '.join(required)}{optional}"


FORMATS = {
    each.name: each
    for each in (
        Format(
            "instruction",
            {
                "instruction": ("instruction", "prompt", "input", "query", "source"),
                "response": ("response", "output", "answer", "target"),
            },
            convert.from_instruction,
            "response",
            {"context": ("input", "context"), **_SYSTEM},
        ),
        Format(
            "messages",
            {"messages": ("messages", "dialog", "chat")},
            convert.from_messages,
            optional={**_TOOLS, **_SYSTEM},
        ),
        Format(
            "sharegpt",
            {"conversations": ("conversations", "conversation")},
            convert.from_sharegpt,
            optional={**_TOOLS, **_SYSTEM},
        ),
        Format(
            "completion",
            {"prompt": ("prompt",), "completion": ("completion",)},
            convert.from_completion,
            "completion",
            _TOOLS,
        ),
        Format(
            "question",
            {"question": ("question", "problem"), "answer": ("answer", "answers", "solution", "response", "output")},
            convert.from_question,
            "answer",
            {"context": _PASSAGES, "choices": ("choices", "options"),
             **_SYSTEM},
        ),
        Format(
            "summary",
            {"document": ("document", "article", "dialogue", "text"), "summary": ("summary", "highlights")},
            convert.from_summary,
            "summary",
            _SYSTEM,
        ),
        Format(
            "label",
            {"text": _TEXTS, "label": _LABELS},
            convert.from_label,
            "label",
            {"second": ("sentence2", "hypothesis", "text2", "question2", "text_pair", "second")},
        ),
        Format(
            "tokens",
            {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "labels", "pos_tags")},
            convert.from_tokens,
            "tags",
        ),
        Format("spans", {"text": ("text", "sentence"), "spans": ("spans", "entities")}, convert.from_spans, "spans"),
        Format("text", {"text": ("text", "content")}, convert.from_text),
        Format(
            "image",
            {
                "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img"),
                "label": ("label", "labels", "class", "category", "target", "species", "digit"),
            },
            convert.from_image,
            "label",
            detected="never",
        ),
        Format(
            "preference",
            {"chosen": _CHOSEN, "rejected": _REJECTED},
            convert_answers.from_preference,
            "chosen",
            {"prompt": _PROMPTS, **_CONTEXT, **_MARGIN, **_TOOLS, **_SYSTEM},
            kind="preference",
        ),
        Format(
            "unpaired",
            {"completion": _COMPLETIONS, "label": _WANTED},
            convert_answers.from_unpaired,
            "completion",
            {"prompt": _PROMPTS, **_CONTEXT, **_TOOLS, **_SYSTEM},
            detected="if_wanted",
            kind="unpaired",
        ),
        Format(
            "prompts",
            {"prompt": ("prompt", "instruction", "messages", "conversations", "conversation", "query", "input")},
            convert_answers.from_prompt,
            optional={**_CONTEXT, **_TOOLS, **_SYSTEM},
            detected="if_wanted",
            kind="prompts",
            keeps_row=True,
        ),
        Format(
            "question_prompts",
            {"question": ("question", "problem")},
            convert_answers.from_question_prompt,
            optional={"context": _PASSAGES, "choices": ("choices", "options"), **_SYSTEM},
            detected="if_wanted",
            kind="prompts",
            variant_of="prompts",
            keeps_row=True,
        ),
        Format(
            "raw_preference",
            {"chosen": _CHOSEN, "rejected": _REJECTED},
            convert_answers.from_raw_preference,
            "chosen",
            {"prompt": _PROMPTS, **_MARGIN},
            detected="never",
            kind="preference",
        ),
        Format(
            "raw_unpaired",
            {"completion": _COMPLETIONS, "label": _WANTED},
            convert_answers.from_raw_unpaired,
            "completion",
            {"prompt": _PROMPTS},
            detected="never",
            kind="unpaired",
        ),
        Format(
            "raw_prompts",
            {"prompt": (*_PROMPTS, "text")},
            convert_answers.from_raw_prompt,
            detected="never",
            kind="prompts",
            keeps_row=True,
        ),
    )
}  # fmt: skip
