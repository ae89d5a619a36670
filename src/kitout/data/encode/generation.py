"""Examples as the items a model learns from, for models that write: causal ones and sequence-to-sequence ones.

An encoder is made once of a tokenizer and a greatest length, and called with examples; it tokenises in batches. What
is too long loses what is given before it loses what is to be said, and says how many tokens. It knows no file, no
model and no padding: whoever pads masks the padding, whatever its token is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kitout.data.encode.chat_template import ChatTemplate
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.spans_to_labels import SpannedText, SpanTokenizer
from kitout.data.examples.examples import Chat, Completion, Example, LabeledText, TaggedWords, Text
from kitout.data.read.tables import DataError, add_first
from kitout.errors import Errors

MIN_MAX_LENGTH = 8  # a shorter limit leaves no room for a prompt, an answer and their marks


class CausalEncoder:
    """Chats by the tokenizer's template, prompts with their completions and plain text, as a causal model reads them.

    learn: for chats "assistant" turns, the "last" of them or "all"; "all" learns prompts too. max_length: of an item in
    tokens. options: for the template. Chats whose template forgets become several items (see `chat`), long plain texts
    one for every block.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        train_on: str = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.max_length = _check_max_length(max_length)
        self.span_tokenizer = SpanTokenizer(tokenizer)
        self.span_tokenizer.end_id  # noqa: B018 - a tokenizer without an end is refused before any data is read
        self.template = ChatTemplate(self.span_tokenizer, train_on, template_kwargs)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        marked = encode_each(examples, self._to_spans)
        flat = [m for some in marked for m in some]
        plain = [isinstance(e, Text) for e, some in zip(examples, marked, strict=True) for _ in some]
        made = []
        for item, whole in zip(self.span_tokenizer.encode(flat), plain, strict=True):
            made += (
                self._split_blocks(item) if whole else [truncate(item, self.max_length, self._num_front_tokens(item))]
            )
        return made

    def _to_spans(self, example: Example) -> list[SpannedText]:
        if isinstance(example, Chat):
            return self.template.render_spans(example)
        if isinstance(example, Completion):
            given = len(example.prompt)
            text = example.prompt + example.completion
            spans = ((0 if self.template.train_on == "all" else given, len(text)),)
            answer = example.completion if example.prompt else ""  # nobody can be asked for what answers nothing
            return [SpannedText(text, spans, given, True, True, answer, example.location)]
        if isinstance(example, Text):
            return [SpannedText(example.text, ((0, len(example.text)),), 0, True, True, "", example.location)]
        kind = "a labelled text" if isinstance(example, LabeledText) else "a tagged text"
        raise DataError(f"{kind} has no answer in words for a causal model; give an instruction, or train a classifier")

    def _num_front_tokens(self, item: EncodedExample) -> int:
        """Tokens that stay in front whatever is cut: the start of the text, where models look first."""
        return (
            1
            if item.input_ids and item.input_ids[0] in self.span_tokenizer.special_tokens and item.prompt_length
            else 0
        )

    def _split_blocks(self, item: EncodedExample) -> list[EncodedExample]:
        """A text that is too long as consecutive blocks; each begins as the text does, nothing is left out."""
        if len(item.input_ids) <= self.max_length:
            return [item]
        lead = len(self.span_tokenizer.start_ids)
        step = self.max_length - lead
        front, silent = item.input_ids[:lead], item.labels[:lead]
        return [
            replace(item, input_ids=front + item.input_ids[at : at + step], labels=silent + item.labels[at : at + step])
            for at in range(lead, len(item.input_ids), step)
        ]


@dataclass(frozen=True)
class Seq2SeqEncoder:
    """What is given as the source, what is to be said as the target, each with the tokenizer's own special tokens."""

    tokenizer: Any
    max_length: int
    max_target_length: int | None = None  # None: as max_length

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        encode_each(examples, self._check_example)
        if not examples:
            return []
        _check_max_length(self.max_length)
        end = SpanTokenizer(self.tokenizer).end_id
        sources = self._encode_texts([e.source_text() for e in examples], self.max_length)
        targets = self._encode_texts(
            [e.answer_text() for e in examples], self.max_target_length or self.max_length, end
        )
        return [
            EncodedExample(
                ids,
                target_ids=target,
                reference=e.answer_text(),
                num_truncated=cut + lost,
                num_truncated_targets=lost,
                location=e.location,
            )
            for e, (ids, cut), (target, lost) in zip(examples, sources, targets, strict=True)
        ]

    def _check_example(self, example: Example) -> None:
        if not example.answer_text():
            raise DataError("there is nothing to be said about this text; sequence-to-sequence models need an answer")
        if isinstance(example, TaggedWords):
            raise DataError("tags are learnt by token classification")

    def _encode_texts(
        self, texts: list[str], max_length: int, end_id: int | None = None
    ) -> list[tuple[tuple[int, ...], int]]:
        """Ids of each text and how many were cut; with `end` they end in it, or would if they were not cut."""
        whole = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        made = []
        for ids in whole:
            full = [*ids, end_id] if end_id is not None and ids[-1:] != [end_id] else list(ids)
            if len(full) > max_length and end_id is None and full[-1] in self.tokenizer.all_special_ids:
                short = [*full[: max_length - 1], full[-1]]  # an encoder's texts end as it knows them
            else:
                short = full[:max_length]
            made.append((tuple(short), len(full) - len(short)))
        return made


def truncate(item: EncodedExample, max_length: int, keep_front: int) -> EncodedExample:
    """At most `most` tokens; cut and lost say what went.

    First goes what follows the last learnt token, then what is given from its beginning (less the first `kept`), then
    the end of an answer that is too long alone.
    """
    if len(item.input_ids) <= max_length:
        return item
    total, learnt = len(item.input_ids), item.num_targets
    last = max((i for i, label in enumerate(item.labels) if label != IGNORE_INDEX), default=total - 1) + 1
    ids, labels, prompt = item.input_ids[:last], item.labels[:last], min(item.prompt_length, last)
    spare = min(max(len(ids) - max_length, 0), max(prompt - keep_front, 0))
    ids, labels = ids[:keep_front] + ids[keep_front + spare :], labels[:keep_front] + labels[keep_front + spare :]
    ids, labels = ids[:max_length], labels[:max_length]
    left = sum(label != IGNORE_INDEX for label in labels)
    return replace(
        item,
        input_ids=ids,
        labels=labels,
        prompt_length=prompt - spare,
        num_truncated=item.num_truncated + total - len(ids),
        num_truncated_targets=item.num_truncated_targets + learnt - left,
    )


def encode_each(examples: Sequence[Example], encode: Callable[[Example], Any]) -> list[Any]:
    """What `make` makes of each example; the examples it refuses are told together, with their places."""
    made, bad = [], []
    for example in examples:
        try:
            made.append(encode(example))
        except DataError as wrong:
            bad.append(f"{example.location or 'an example'}: {wrong}")
    faults = Errors(DataError, "these examples cannot be encoded")
    add_first(faults, bad, "examples")
    faults.raise_if_any()
    return made


def _check_max_length(max_length: int) -> int:
    if max_length < MIN_MAX_LENGTH:
        raise DataError(f"max_length is {max_length}, expected at least {MIN_MAX_LENGTH} tokens")
    return max_length
