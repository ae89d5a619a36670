"""Text with spans that are trained on, and its exact way to token ids and labels.

A text is cut where a trained span begins, and each piece is tokenized alone: a model meets the prompt without the
answer, so no token may hold the end of the one and the start of the other. Offsets say where a span ends.
It knows no templates, no formats and no lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.read.tables import DataError

UNKNOWN_ANSWER = "its answer has characters that the vocabulary lacks: {} is trained on in their place"
BATCH_SIZE = 1000  # texts whose offsets are in memory at once


@dataclass(frozen=True)
class SpannedText:
    """A text and the spans of it that are trained on."""

    text: str
    """The whole text."""
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) that are trained on, in order, disjoint."""
    answer_start: int = 0
    """The character where the last trained turn begins."""
    add_start_token: bool = False
    """Whether the tokenizer's own start tokens go before it; a chat template writes its own."""
    add_end_token: bool = False
    """Whether the end token goes after it, and is trained on."""
    reference: str = ""
    """The answer as text."""
    location: str = ""
    """Where it was read, for messages."""
    remarks: tuple[str, ...] = ()
    """What of the example is not in the text, for the pre-flight."""


class SpanTokenizer:
    """A tokenizer as this folder uses it: ids of spanned texts, its start and end tokens, its special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which gives no offsets of its tokens;"
                " load the model's fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
            )
        self.tokenizer = tokenizer
        self._id_cache: dict[int, int] = {}  # one number in memory for each token, however often it comes

    @cached_property
    def end_id(self) -> int:
        """The id of the token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token: no model can learn where to stop; set eos_token")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def _unknown_id(self) -> int | None:
        """The token of what the vocabulary lacks; None where there is none, or where it is the end or start too."""
        unknown = self.tokenizer.unk_token_id
        return None if unknown in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id) else unknown

    def remarks_on_targets(self, target_ids: Sequence[int], text: str) -> tuple[str, ...]:
        """What is wrong with the tokens of an answer: characters that the vocabulary does not have."""
        if self._unknown_id is None or self._unknown_id not in target_ids or self.tokenizer.unk_token in text:
            return ()
        return (UNKNOWN_ANSWER.format(self.tokenizer.unk_token),)

    def without_end(self, answer: str) -> str:
        """The answer without the end token that the data may have written behind it: it is added anyway."""
        end = self.tokenizer.eos_token
        while end and answer.endswith(end):
            answer = answer.removesuffix(end)
        return answer

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before every text."""
        without, with_special = self._encode_text("a", False), self._encode_text("a", True)
        starts = range(len(with_special))
        return tuple(with_special[: next((i for i in starts if with_special[i : i + len(without)] == without), 0)])

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Tokens that are no text: end and start of a turn, of a document."""
        added = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        return {**added, **dict(named)}

    @cached_property
    def adds_leading_space(self) -> bool:
        """Whether a text alone gets a leading space, as with sentencepiece: each piece of a text would get one."""
        first = self._encode_text("a", False)[:1]
        return any(str(self.tokenizer.convert_ids_to_tokens(i)).startswith(("▁", "Ġ")) for i in first)

    def _encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def encode(self, texts: Sequence[SpannedText]) -> list[EncodedExample]:
        """One untruncated example each. A batch is tokenized at once."""
        batches = (texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE))
        return [example for batch in batches for example in self._encode_batch(batch)]

    def _encode_batch(self, texts: Sequence[SpannedText]) -> list[EncodedExample]:
        pieces_of_texts = [self._split_text(spanned) for spanned in texts]
        encoding = self.tokenizer(
            [piece for pieces in pieces_of_texts for piece in pieces], add_special_tokens=False,
            return_offsets_mapping=True, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        encoded_pieces = iter(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
        examples = []
        for spanned, pieces in zip(texts, pieces_of_texts, strict=True):
            ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            piece_start = 0
            for piece in pieces:
                piece_ids, piece_offsets = next(encoded_pieces)
                ids += [self._id_cache.setdefault(i, i) for i in piece_ids]
                offsets += [(start + piece_start, end + piece_start) for start, end in piece_offsets]
                piece_start += len(piece)
            examples.append(self._to_example(spanned, ids, offsets))
        return examples

    def _split_text(self, spanned: SpannedText) -> list[str]:
        """Cut at the start of every span, and at the answer.

        Not cut where each piece would get a leading space of its own; there a token that holds both is trained on. (An
        earlier answer that begins with white space may be tokenized differently once it is history; it is trained on
        as it was written.)
        """
        cuts = {spanned.answer_start, *(start for start, _ in spanned.spans)}
        starts = [] if self.adds_leading_space else sorted(cut for cut in cuts if 0 < cut < len(spanned.text))
        return [spanned.text[a:b] for a, b in zip([0, *starts], [*starts, len(spanned.text)], strict=True)]

    def _to_example(self, spanned: SpannedText, ids: list[int], offsets: list[tuple[int, int]]) -> EncodedExample:
        labels = [IGNORE_INDEX] * len(ids)
        spans = iter(spanned.spans)
        start, end = next(spans, (len(spanned.text) + 1, 0))
        for i, (a, b) in enumerate(offsets):
            while end < b and a >= end and not a == b == end:
                start, end = next(spans, (len(spanned.text) + 1, len(spanned.text) + 2))
            if b > start and (a < end or a == b == end):  # offsets of white space may be trimmed to nothing
                labels[i] = ids[i]
        prompt_length = 0
        if spanned.answer_start:
            prompt_length = next((i for i, (_, b) in enumerate(offsets) if b > spanned.answer_start), len(ids))
        if spanned.add_start_token:
            ids, labels = [*self.start_ids, *ids], [*[IGNORE_INDEX] * len(self.start_ids), *labels]
            prompt_length += len(self.start_ids) if spanned.answer_start else 0
        if spanned.add_end_token and (not ids or ids[-1] != self.end_id):
            ids, labels = [*ids, self.end_id], [*labels, self.end_id]
        return EncodedExample(
            tuple(ids),
            tuple(labels),
            prompt_length=prompt_length,
            reference=spanned.reference,
            location=spanned.location,
            remarks=spanned.remarks + self.remarks_on_targets(labels, spanned.text),
        )
