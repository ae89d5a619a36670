"""Text in which stretches are marked to be learnt, and its exact way to token ids and labels.

A text is cut where something learnt begins and each piece is tokenised alone: a model meets what it is given without
the answer, so no token may hold the end of the one and the start of the other. Offsets say where a stretch ends.
It knows no templates, no formats and no lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.read.tables import DataError

BATCH_SIZE = 1000  # texts whose offsets are in memory at once


@dataclass(frozen=True)
class SpannedText:
    """text and what is to be learnt of it.

    spans: characters [from, to), in order, apart. answer: the character where the last learnt turn begins.
    opened: the tokenizer's own start tokens go in front (a chat template writes its own). ended: the end token is put
    behind and learnt.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    answer_start: int = 0
    add_start_token: bool = False
    add_end_token: bool = False
    reference: str = ""
    location: str = ""


class SpanTokenizer:
    """A tokenizer as this room uses it: ids of marked texts, its start and end tokens, its special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell where its tokens stand in a text;"
                " load the model's fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
            )
        self.tokenizer = tokenizer
        self._id_cache: dict[int, int] = {}  # one number in memory for each token, however often it comes

    @cached_property
    def end_id(self) -> int:
        """The id of the token that says it is over."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token: no model can learn where to stop; set eos_token")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of every text of its own."""
        bare, dressed = self._encode_text("a", False), self._encode_text("a", True)
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        return tuple(dressed[:at])

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Tokens that are no text: end and start of a turn, of a document."""
        added = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        return {**added, **dict(named)}

    @cached_property
    def adds_leading_space(self) -> bool:
        """Whether a text alone gets a space in front, as sentencepiece does: its pieces would get one each."""
        first = self._encode_text("a", False)[:1]
        return any(str(self.tokenizer.convert_ids_to_tokens(i)).startswith(("▁", "Ġ")) for i in first)

    def _encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def encode(self, texts: Sequence[SpannedText]) -> list[EncodedExample]:
        """One item each, whole; `encode` shortens them. A batch is tokenised at once."""
        return [
            item for at in range(0, len(texts), BATCH_SIZE) for item in self._encode_batch(texts[at : at + BATCH_SIZE])
        ]

    def _encode_batch(self, texts: Sequence[SpannedText]) -> list[EncodedExample]:
        cut = [self._split_text(marked) for marked in texts]
        said = self.tokenizer(
            [piece for pieces in cut for piece in pieces], add_special_tokens=False, return_offsets_mapping=True,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        coded = iter(zip(said["input_ids"], said["offset_mapping"], strict=True))
        made = []
        for marked, pieces in zip(texts, cut, strict=True):
            ids: list[int] = []
            places: list[tuple[int, int]] = []
            at = 0
            for piece in pieces:
                some, where = next(coded)
                ids += [self._id_cache.setdefault(i, i) for i in some]
                places += [(a + at, b + at) for a, b in where]
                at += len(piece)
            made.append(self._to_example(marked, ids, places))
        return made

    def _split_text(self, spanned: SpannedText) -> list[str]:
        """Cut at every start of a stretch, and at the answer.

        Whole where each piece would get a space of its own; there a token that holds both is learnt. (An earlier answer
        that begins with white space may be tokenised otherwise once it is history; it is learnt as it was written.)
        """
        at = {spanned.answer_start, *(a for a, _ in spanned.spans)}
        starts = [] if self.adds_leading_space else sorted(a for a in at if 0 < a < len(spanned.text))
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
        prompt = (
            next((i for i, (_, b) in enumerate(offsets) if b > spanned.answer_start), len(ids))
            if spanned.answer_start
            else 0
        )
        if spanned.add_start_token:
            ids, labels = [*self.start_ids, *ids], [*[IGNORE_INDEX] * len(self.start_ids), *labels]
            prompt += len(self.start_ids) if spanned.answer_start else 0
        if spanned.add_end_token and (not ids or ids[-1] != self.end_id):
            ids, labels = [*ids, self.end_id], [*labels, self.end_id]
        return EncodedExample(
            tuple(ids), tuple(labels), prompt_length=prompt, reference=spanned.reference, location=spanned.location
        )
