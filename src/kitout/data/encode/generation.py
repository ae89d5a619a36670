"""Examples encoded for models that write: causal ones and sequence-to-sequence ones.

An encoder is made once from a tokenizer and a maximum length, and called with examples; it tokenizes in batches.
Truncation takes context before it takes the answer, and counts the tokens it took. It knows no file, no model and no
padding: whoever pads masks the padding, whatever its token is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kitout.data.encode.assistant_spans import AssistantSpans
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.languages import Languages
from kitout.data.encode.spans_to_labels import SpannedText, SpanTokenizer
from kitout.data.encode.template_coverage import check_without_template
from kitout.data.examples.examples import Chat, Completion, Example, LabeledText, TaggedWords, Text
from kitout.data.examples.preferences import PREFERENCE_KINDS
from kitout.data.read.tables import MAX_MESSAGE_CHARS, DataError, add_first
from kitout.errors import BadRows, Errors

T = TypeVar("T")

MIN_MAX_LENGTH = 8  # a shorter limit leaves no room for a prompt, an answer and their special tokens


class CausalEncoder:
    """Chats by the tokenizer's template, prompts with their completions and plain text, as a causal model reads them.

    max_length: of an encoded example, in tokens. train_on: of chats every "assistant" turn, the "last" of them, or
    "all"; "all" trains on prompts too. template_kwargs: for the chat template. A chat whose template renders earlier
    turns differently later becomes several examples (see `assistant_spans`), a long plain text one for every block.
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
        self.assistant_spans = AssistantSpans(self.span_tokenizer, train_on, template_kwargs)

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        texts_of_examples = encode_each(examples, self.to_spans)
        texts = [text for some in texts_of_examples for text in some]
        owners = [e for e, some in zip(examples, texts_of_examples, strict=True) for _ in some]
        encoded: list[EncodedExample] = []
        for item, owner in zip(self.span_tokenizer.encode(texts), owners, strict=True):
            untruncated = replace(item, group=owner.group) if owner.group else item
            if isinstance(owner, Text):
                encoded += self._split_blocks(untruncated)
            else:
                encoded.append(truncate(untruncated, self.max_length, self.num_front_tokens(untruncated)))
        return encoded

    def to_spans(self, example: Example) -> list[SpannedText]:
        """An example as texts with trained spans: one, or several of a chat (see `assistant_spans`)."""
        if isinstance(example, Chat):
            return self.assistant_spans.find(example)
        if isinstance(example, Completion):
            prompt_end = len(example.prompt)
            text = example.prompt + example.completion
            spans = ((0 if self.assistant_spans.train_on == "all" else prompt_end, len(text)),)
            completion = self.span_tokenizer.without_end(example.completion)
            answer = completion if example.prompt else ""  # without a prompt nothing can be generated from it
            return [SpannedText(text, spans, prompt_end, True, True, answer, example.location)]
        if isinstance(example, Text):
            return [SpannedText(example.text, ((0, len(example.text)),), 0, True, True, "", example.location)]
        if isinstance(example, PREFERENCE_KINDS):
            raise DataError(f"a {type(example).__name__} is for alignment (`kitout align`), not for plain training")
        kind = "a labeled text" if isinstance(example, LabeledText) else "a tagged text"
        raise DataError(f"{kind} has no answer in words for a causal model; give an instruction, or train a classifier")

    def num_front_tokens(self, item: EncodedExample) -> int:
        """Tokens that stay at the front whatever is truncated: the start of the text, where models look first."""
        ids = item.input_ids
        return 1 if ids and ids[0] in self.span_tokenizer.special_tokens and item.prompt_length else 0

    def _split_blocks(self, item: EncodedExample) -> list[EncodedExample]:
        """A long text as consecutive blocks; each begins with the start tokens, nothing is left out."""
        if len(item.input_ids) <= self.max_length:
            return [item]
        num_start = len(self.span_tokenizer.start_ids)
        step = self.max_length - num_start
        start_ids, start_labels = item.input_ids[:num_start], item.labels[:num_start]
        return [
            replace(
                item,
                input_ids=start_ids + item.input_ids[at : at + step],
                labels=start_labels + item.labels[at : at + step],
            )
            for at in range(num_start, len(item.input_ids), step)
        ]


@dataclass(frozen=True)
class Seq2SeqEncoder:
    """The prompt as source and the answer as target, each with the tokenizer's own special tokens."""

    tokenizer: Any
    """A tokenizer of transformers."""
    max_length: int
    """Of a source, in tokens."""
    max_target_length: int | None = None
    """Of a target, in tokens; None: as max_length."""
    languages: Languages | None = None
    """What the tokenizer writes into source and target; None: it has no languages."""

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample]:
        remarks = encode_each(examples, self._check_example)
        if not examples:
            return []
        _check_max_length(self.max_length)
        if self.languages is not None:
            self.languages.apply(self.tokenizer)
        span_tokenizer = SpanTokenizer(self.tokenizer)
        has_end = span_tokenizer.end_id in self.tokenizer(text_target="")["input_ids"]
        answers = [span_tokenizer.without_end(e.answer_text()) for e in examples]
        sources = self._encode_texts([e.source_text() for e in examples], self.max_length)
        targets = self._encode_texts(answers, self.max_target_length or self.max_length, True, has_end)
        return [
            EncodedExample(
                ids,
                target_ids=target,
                reference=answer,
                num_truncated=cut + cut_targets,
                num_truncated_targets=cut_targets,
                location=e.location,
                remarks=left_out + span_tokenizer.remarks_on_targets(target, answer),
                group=e.group,
            )
            for e, left_out, answer, (ids, cut), (target, cut_targets) in zip(
                examples, remarks, answers, sources, targets, strict=True
            )
        ]

    def _check_example(self, example: Example) -> tuple[str, ...]:
        """Remarks on what of it is not read."""
        if not example.answer_text():
            raise DataError("it has no answer; sequence-to-sequence models need one")
        if isinstance(example, TaggedWords):
            raise DataError("it has tags; train token classification on them")
        if not isinstance(example, Chat):
            return ()
        if example.tools:
            raise DataError("it has tools, which sequence-to-sequence models have no place for; leave the column out")
        return check_without_template(example)

    def _encode_texts(
        self, texts: list[str], max_length: int, are_targets: bool = False, has_end: bool = False
    ) -> list[tuple[tuple[int, ...], int]]:
        """Ids of each text and how many were truncated; targets end in the end token, or would if not truncated.

        has_end: whether the tokenizer ends targets itself, perhaps with a language code behind the end token.
        """
        encoded = []
        options = {"return_attention_mask": False, "verbose": False}
        arguments = {"text_target": texts} if are_targets else {"text": texts}
        for ids in self.tokenizer(**arguments, **options)["input_ids"]:
            full = [*ids, self.tokenizer.eos_token_id] if are_targets and not has_end else list(ids)
            if len(full) > max_length and not are_targets and full[-1] in self.tokenizer.all_special_ids:
                short = [*full[: max_length - 1], full[-1]]  # a source keeps the end token of its encoder
            else:
                short = full[:max_length]
            encoded.append((tuple(short), len(full) - len(short)))
        return encoded


def truncate(item: EncodedExample, max_length: int, keep_front: int) -> EncodedExample:
    """At most `max_length` tokens; the counts of truncated tokens grow by what went.

    First goes what follows the last trained token, then the prompt from its beginning (less the first `keep_front`
    tokens), then the end of an answer that is too long alone.
    """
    if len(item.input_ids) <= max_length:
        return item
    total = len(item.input_ids)
    last = max((i for i, label in enumerate(item.labels) if label != IGNORE_INDEX), default=total - 1) + 1
    ids, labels, prompt_length = item.input_ids[:last], item.labels[:last], min(item.prompt_length, last)
    cut = min(max(len(ids) - max_length, 0), max(prompt_length - keep_front, 0))
    ids, labels = ids[:keep_front] + ids[keep_front + cut :], labels[:keep_front] + labels[keep_front + cut :]
    ids, labels = ids[:max_length], labels[:max_length]
    num_targets_left = sum(label != IGNORE_INDEX for label in labels)
    return replace(
        item,
        input_ids=ids,
        labels=labels,
        prompt_length=prompt_length - cut,
        num_truncated=item.num_truncated + total - len(ids),
        num_truncated_targets=item.num_truncated_targets + item.num_targets - num_targets_left,
    )


def encode_each(examples: Sequence[Example], encode: Callable[[Example], Any]) -> list[Any]:
    """`encode` of each example; the examples it refuses are reported together, with their locations."""
    encoded: list[Any] = []
    refused: dict[int, str] = {}
    for i, example in enumerate(examples):
        try:
            encoded.append(encode(example))
        except DataError as error:
            refused[i] = f"{example.location or 'an example'}: {error}"[:MAX_MESSAGE_CHARS]
    raise_refused(refused)
    return encoded


def raise_refused(refused: dict[int, str]) -> None:
    """BadRows with all messages, if there are any. refused: by the number of the example."""
    errors = Errors(BadRows, "these examples cannot be encoded")
    add_first(errors, list(refused.values()), "examples")
    try:
        errors.raise_if_any()
    except BadRows as error:
        error.messages = refused
        raise


def encode_good(
    encode: Callable[[Sequence[Example]], list[T]], examples: Sequence[Example], skipped: list[str] | None
) -> list[T]:
    """`encode` of the examples; those it refuses are left out and listed in `skipped`. None: they are an error."""
    try:
        return encode(examples)
    except BadRows as error:
        if skipped is None:
            raise
        for message in error.messages.values():
            skipped.append(message)
        return encode([example for i, example in enumerate(examples) if i not in error.messages])


def _check_max_length(max_length: int) -> int:
    if max_length < MIN_MAX_LENGTH:
        raise DataError(f"max_length is {max_length}, expected at least {MIN_MAX_LENGTH} tokens")
    return max_length
