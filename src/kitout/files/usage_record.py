"""How an adapter is used, as `adapter.json` holds it: task, labels, preprocessing, and which base it was trained on.

An input has to reach the model as the training examples did, so everything that decides it stands here: the tokenizer
and chat template by digest, lengths, system prompt, the settings of the image processor. Of the base there is a name
that holds on any machine, never a path. It knows no tokenizer and no model; `kitout.predict` reads it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseRecord(BaseModel):
    """The frozen model, and how it was loaded."""

    model_config = _STRICT

    name: str
    """As the hub or the list of built-in models has it; of a local folder its own name."""
    source: Literal["hub", "built-in", "folder"]
    """Where a model of that name is found."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights."""
    attention: str = "auto"
    """The implementation of attention, as `model.attention` names it."""
    quantization: str = "none"
    """As `model.quantization` names it."""


class TextRecord(BaseModel):
    """From a row to token ids."""

    model_config = _STRICT

    tokenizer: str
    """A digest of the vocabulary and of how a text is cut into tokens."""
    chat_template: str | None = None
    """A digest of the chat template; None where the tokenizer has none."""
    format: str | None = None
    """The format of the training examples, as `data.train.format` names it."""
    columns: dict[str, str] = {}
    """The column of each role of the format."""
    system_prompt: str | None = None
    """The system turn that examples without one got."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template takes besides the turns."""
    template_date: str | None = None
    """The day (YYYY-MM-DD) that the chat template takes for today."""
    max_length: int = Field(gt=0)
    """Tokens of one text at most; longer ones are truncated."""
    max_new_tokens: int | None = None
    """Tokens of a generated answer at most."""
    src_lang: str | None = None
    """The language of sources, by the tokenizer's code."""
    tgt_lang: str | None = None
    """The language of answers, by the tokenizer's code."""
    answers: list[str] = []
    """The closed set of answers of a language model; empty where it writes freely."""
    answer_tokens: list[list[int]] = []
    """Of each answer: its token ids after a prompt, without the end token."""
    end_token: int | None = None
    """The token id that ends an answer of the closed set."""


class ImagesRecord(BaseModel):
    """From an image to pixel values."""

    model_config = _STRICT

    size: int | None = None
    """Pixels of a side; None: the processor's own size."""
    processor: dict[str, Any]
    """Every setting of the image processor."""


class UsageRecord(BaseModel):
    """What an input needs to become a prediction."""

    model_config = _STRICT

    task: str
    """As `objective` of a run names it."""
    labels: list[str] = []
    """The closed set of labels, in the order of the model's outputs."""
    base: BaseRecord
    text: TextRecord | None = None
    """Of texts."""
    images: ImagesRecord | None = None
    """Of images."""
