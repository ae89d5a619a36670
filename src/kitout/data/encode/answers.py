"""Pairs, judged answers and prompts encoded for alignment: answers as `CausalEncoder` encodes the last turn of a chat.

Truncation takes the front of the prompt, from both answers of a pair alike, and never an answer: an example whose
answers do not fit beside a token of the prompt is left out and listed in `dropped`. A prompt ends with the chat
template's generation prompt and leaves room for what is to be written. It knows no loss, no model and no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kitout.data.encode.generation import MIN_MAX_LENGTH, CausalEncoder, encode_each, raise_refused
from kitout.data.encode.item import EncodedExample, EncodedPair, EncodedPrompt, EncodedUnpaired, without_first_target
from kitout.data.encode.prompts import PromptEncoder
from kitout.data.encode.spans_to_labels import SpannedText
from kitout.data.examples.examples import Chat, Completion, Example
from kitout.data.examples.preferences import PreferencePair, Prompt, UnpairedAnswer, unpair
from kitout.data.read.tables import DataError

SAME_TOKENS = "the chosen and the rejected answer have the same tokens: such a pair says nothing"
NO_ROOM_LEFT = "{location}: its answer leaves no room for the prompt: {tokens} of at most {max_length:,} tokens"
SEVERAL_TEXTS = (
    "the chat template writes the turns of its answer differently once others follow, so they are no one answer: keep "
    "its last turn alone"
)


class AnswerRows:
    """Prompts with their answers as rows of tokens, at most `max_length` long; what does not fit is in `dropped`.

    template_kwargs: for the chat template. dropped: gets a message for every example that does not fit.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        template_kwargs: Mapping[str, Any] | None = None,
        dropped: list[str] | None = None,
    ) -> None:
        self.causal = CausalEncoder(tokenizer, max_length, "last", template_kwargs)
        self.dropped = [] if dropped is None else dropped

    def encode(self, examples: Sequence[Example], sides: Sequence[Sequence[SpannedText]]) -> list[list[EncodedExample]]:
        """The rows of each example, truncated alike; none where they do not fit."""
        rows = iter(self.causal.span_tokenizer.encode([text for texts in sides for text in texts]))
        return [
            self._truncate([self._as_row(next(rows), example.group) for _ in texts], example.location)
            for example, texts in zip(examples, sides, strict=True)
        ]

    def to_spans(self, example: Chat | Completion) -> SpannedText:
        """One text, whose answer begins with the first turn that is trained on."""
        texts = self.causal.to_spans(example)
        if len(texts) != 1:
            raise DataError(SEVERAL_TEXTS)
        (text,) = texts
        return replace(text, answer_start=min(text.answer_start, text.spans[0][0]))

    def _as_row(self, row: EncodedExample, group: str) -> EncodedExample:
        """In its group, and without its first token as a target: raw text may have no prompt and no start token."""
        row = replace(row, group=group) if group else row
        return replace(row, labels=without_first_target(row.labels))

    def _truncate(self, rows: list[EncodedExample], location: str) -> list[EncodedExample]:
        max_length = self.causal.max_length
        cut = max(max(len(row.input_ids) for row in rows) - max_length, 0)
        if not cut:
            return rows
        kept_front = self.causal.num_front_tokens(rows[0])
        if cut > min(row.prompt_length for row in rows) - max(kept_front, 1):
            tokens = " and ".join(f"{len(row.input_ids) - row.prompt_length:,}" for row in rows)
            self.dropped.append(NO_ROOM_LEFT.format(location=location, tokens=tokens, max_length=max_length))
            return []
        return [_cut_front(row, cut, kept_front) for row in rows]


class PairEncoder:
    """Preference pairs; both answers lose the same tokens of the prompt. Arguments: see `AnswerRows`."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        template_kwargs: Mapping[str, Any] | None = None,
        dropped: list[str] | None = None,
    ) -> None:
        self.rows = AnswerRows(tokenizer, max_length, template_kwargs, dropped)

    @property
    def dropped(self) -> list[str]:
        """Where each pair was read that does not fit, and why."""
        return self.rows.dropped

    def __call__(self, examples: Sequence[Example]) -> list[EncodedPair]:
        """The pairs that fit. BadRows for examples that are none, or whose answers have the same tokens."""
        num_dropped = len(self.dropped)
        encoded = self.rows.encode(examples, encode_each(examples, self._to_spans))
        refused = {i: f"{examples[i].location or 'an example'}: {SAME_TOKENS}" for i, rows in enumerate(encoded)
                   if rows and rows[0].input_ids == rows[1].input_ids}  # fmt: skip
        if refused:
            del self.dropped[num_dropped:]  # the others are encoded again, if these may be left out
        raise_refused(refused)
        return [
            EncodedPair(rows[0], rows[1], _pair(example).margin)
            for example, rows in zip(examples, encoded, strict=True)
            if rows
        ]

    def _to_spans(self, example: Example) -> list[SpannedText]:
        pair = _pair(example)
        return [self.rows.to_spans(replace(side, location=pair.location)) for side in (pair.chosen, pair.rejected)]


class UnpairedEncoder:
    """Answers that are wanted or not, and pairs as two of them. Arguments: see `AnswerRows`."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        template_kwargs: Mapping[str, Any] | None = None,
        dropped: list[str] | None = None,
    ) -> None:
        self.rows = AnswerRows(tokenizer, max_length, template_kwargs, dropped)

    @property
    def dropped(self) -> list[str]:
        """Where each answer was read that does not fit, and why."""
        return self.rows.dropped

    def __call__(self, examples: Sequence[Example]) -> list[EncodedUnpaired]:
        """The answers that fit; both of a pair, as TRL unpairs them. BadRows for other examples."""
        encoded = encode_each(examples, self._to_spans)
        judged = [(example, *one) for example, of_example in zip(examples, encoded, strict=True) for one in of_example]
        rows = self.rows.encode([example for example, *_ in judged], [[text] for _, text, _ in judged])
        return [
            EncodedUnpaired(row, is_desirable)
            for (_, _, is_desirable), rows_of_answer in zip(judged, rows, strict=True)
            for row in rows_of_answer
        ]

    def _to_spans(self, example: Example) -> list[tuple[SpannedText, bool]]:
        if not isinstance(example, PreferencePair | UnpairedAnswer):
            raise DataError(f"it is a {type(example).__name__}, expected an answer with a label")
        answers = unpair([example]) if isinstance(example, PreferencePair) else [example]
        return [(self.rows.to_spans(replace(one.answer, location=one.location)), one.is_desirable) for one in answers]


@dataclass
class RolloutPromptEncoder:
    """Prompts that a model answers with up to `max_new_tokens` tokens."""

    tokenizer: Any
    """A fast tokenizer of transformers."""
    max_length: int
    """Of a prompt with its answer, in tokens."""
    max_new_tokens: int
    """Of an answer."""
    template_kwargs: Mapping[str, Any] | None = None
    """For the chat template."""
    overlong: Literal["cut", "drop"] = "cut"
    """What happens to a prompt without room for its answer: its front is cut, or it is left out."""
    dropped: list[str] = field(default_factory=list)
    """Gets a message for every prompt that is left out."""

    def __post_init__(self) -> None:
        self.prompts = PromptEncoder(self.tokenizer, self.template_kwargs)
        self.max_prompt_length = self.max_length - self.max_new_tokens
        if self.max_prompt_length < MIN_MAX_LENGTH:
            raise DataError(
                f"max_length={self.max_length} leaves {max(self.max_prompt_length, 0)} tokens for a prompt beside "
                f"max_new_tokens={self.max_new_tokens}, expected at least {MIN_MAX_LENGTH}: choose a larger max_length "
                "or fewer new tokens"
            )

    def __call__(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
        """The prompts. BadRows for other examples, and for chats that the template cannot render."""
        encoded = encode_each(examples, self._encode)
        return [item for item in map(self._truncate, encoded) if item is not None]

    def _encode(self, example: Example) -> EncodedPrompt:
        if not isinstance(example, Prompt):
            raise DataError(f"it is a {type(example).__name__}, expected a prompt")
        prompt: str | tuple[dict[str, Any], ...]
        if isinstance(example.prompt, str):
            ids, prompt = self.prompts.encode_text(example.prompt), example.prompt
        else:
            turns = example.prompt.turns
            ids = self.prompts.encode_chat(example.prompt)
            prompt = turns[-1].text if example.is_text else tuple(dict(turn.message) for turn in turns)
        if not ids:
            raise DataError("the prompt has no tokens: there is nothing to go on from")
        return EncodedPrompt(ids, prompt, example.row, example.location, group=example.group)

    def _truncate(self, item: EncodedPrompt) -> EncodedPrompt | None:
        ids, cut = item.input_ids, max(len(item.input_ids) - self.max_prompt_length, 0)
        if cut and self.overlong == "drop":
            room = f"no room for {self.max_new_tokens:,} new ones in {self.max_length:,}"
            self.dropped.append(f"{item.location}: its {len(ids):,} tokens leave {room}")
            return None
        kept_front = int(ids[0] in self.prompts.span_tokenizer.special_tokens)
        return replace(item, input_ids=ids[:kept_front] + ids[kept_front + cut :], num_truncated=cut) if cut else item


def dropped_text(messages: Sequence[str], noun: str = "examples", max_shown: int = 5) -> str:
    """How many examples were left out because they do not fit, and the first of them."""
    shown = "; ".join(messages[:max_shown])
    return f"{len(messages):,} {noun} do not fit and are left out: {shown}" + ("; ..." if messages[max_shown:] else "")


def _cut_front(row: EncodedExample, cut: int, kept_front: int) -> EncodedExample:
    """The row without `cut` tokens of its prompt, behind those that stay at the front."""
    ids, labels = row.input_ids, row.labels
    return replace(
        row,
        input_ids=ids[:kept_front] + ids[kept_front + cut :],
        labels=labels[:kept_front] + labels[kept_front + cut :],
        prompt_length=row.prompt_length - cut,
        num_truncated=row.num_truncated + cut,
    )


def _pair(example: Example) -> PreferencePair:
    if not isinstance(example, PreferencePair):
        raise DataError(f"it is a {type(example).__name__}, expected a pair of answers")
    return example
