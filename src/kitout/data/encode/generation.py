"""Examples as the items a model learns from, for models that write: causal ones and sequence-to-sequence ones.

An encoder is made once of a tokenizer and a greatest length, and called with examples; it tokenises in batches. What
is too long loses what is given before it loses what is to be said, and says how many tokens. It knows no file, no
model and no padding: whoever pads masks the padding, whatever its token is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kitout.data.encode.chat_template import Template
from kitout.data.encode.item import IGNORED, Item
from kitout.data.encode.spans_to_labels import Marked, Words
from kitout.data.examples.examples import Chat, Completion, Example, Labelled, Tagged, Text
from kitout.data.read.tables import DataError, told
from kitout.errors import Faults

LEAST = 8  # a shorter limit leaves no room for a prompt, an answer and their marks


class Causal:
    """Chats by the tokenizer's template, prompts with their completions and plain text, as a causal model reads them.

    learn: for chats "assistant" turns, the "last" of them or "all"; "all" learns prompts too. max_length: of an item in
    tokens. options: for the template. Chats whose template forgets become several items (see `chat`), long plain texts
    one for every block.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, learn: str = "assistant", options: Mapping[str, Any] | None = None
    ) -> None:
        self.max_length = _checked(max_length)
        self.words = Words(tokenizer)
        self.words.end  # noqa: B018 - a tokenizer without an end is refused before any data is read
        self.template = Template(self.words, learn, options)

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        marked = collected(examples, self._marked)
        flat = [m for some in marked for m in some]
        plain = [isinstance(e, Text) for e, some in zip(examples, marked, strict=True) for _ in some]
        made = []
        for item, whole in zip(self.words.items(flat), plain, strict=True):
            made += self._blocks(item) if whole else [shortened(item, self.max_length, self._kept(item))]
        return made

    def _marked(self, example: Example) -> list[Marked]:
        if isinstance(example, Chat):
            return self.template.mark(example)
        if isinstance(example, Completion):
            given = len(example.prompt)
            text = example.prompt + example.completion
            spans = ((0 if self.template.learn == "all" else given, len(text)),)
            answer = example.completion if example.prompt else ""  # nobody can be asked for what answers nothing
            return [Marked(text, spans, given, True, True, answer, example.place)]
        if isinstance(example, Text):
            return [Marked(example.text, ((0, len(example.text)),), 0, True, True, "", example.place)]
        kind = "a labelled text" if isinstance(example, Labelled) else "a tagged text"
        raise DataError(f"{kind} has no answer in words for a causal model; give an instruction, or train a classifier")

    def _kept(self, item: Item) -> int:
        """Tokens that stay in front whatever is cut: the start of the text, where models look first."""
        return 1 if item.ids and item.ids[0] in self.words.specials and item.prompt else 0

    def _blocks(self, item: Item) -> list[Item]:
        """A text that is too long as consecutive blocks; each begins as the text does, nothing is left out."""
        if len(item.ids) <= self.max_length:
            return [item]
        lead = len(self.words.start)
        step = self.max_length - lead
        front, silent = item.ids[:lead], item.labels[:lead]
        return [
            replace(item, ids=front + item.ids[at : at + step], labels=silent + item.labels[at : at + step])
            for at in range(lead, len(item.ids), step)
        ]


@dataclass(frozen=True)
class Seq2Seq:
    """What is given as the source, what is to be said as the target, each with the tokenizer's own special tokens."""

    tokenizer: Any
    max_length: int
    target_length: int | None = None  # None: as max_length

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        collected(examples, self._check)
        if not examples:
            return []
        _checked(self.max_length)
        end = Words(self.tokenizer).end
        sources = self._ids([e.source_text() for e in examples], self.max_length)
        targets = self._ids([e.answer_text() for e in examples], self.target_length or self.max_length, end)
        return [
            Item(ids, target=target, reference=e.answer_text(), cut=cut + lost, lost=lost, place=e.place)
            for e, (ids, cut), (target, lost) in zip(examples, sources, targets, strict=True)
        ]

    def _check(self, example: Example) -> None:
        if not example.answer_text():
            raise DataError("there is nothing to be said about this text; sequence-to-sequence models need an answer")
        if isinstance(example, Tagged):
            raise DataError("tags are learnt by token classification")

    def _ids(self, texts: list[str], most: int, end: int | None = None) -> list[tuple[tuple[int, ...], int]]:
        """Ids of each text and how many were cut; with `end` they end in it, or would if they were not cut."""
        whole = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        made = []
        for ids in whole:
            full = [*ids, end] if end is not None and ids[-1:] != [end] else list(ids)
            if len(full) > most and end is None and full[-1] in self.tokenizer.all_special_ids:
                short = [*full[: most - 1], full[-1]]  # an encoder's texts end as it knows them
            else:
                short = full[:most]
            made.append((tuple(short), len(full) - len(short)))
        return made


def shortened(item: Item, most: int, kept: int) -> Item:
    """At most `most` tokens; cut and lost say what went.

    First goes what follows the last learnt token, then what is given from its beginning (less the first `kept`), then
    the end of an answer that is too long alone.
    """
    if len(item.ids) <= most:
        return item
    total, learnt = len(item.ids), item.learned
    last = max((i for i, label in enumerate(item.labels) if label != IGNORED), default=total - 1) + 1
    ids, labels, prompt = item.ids[:last], item.labels[:last], min(item.prompt, last)
    spare = min(max(len(ids) - most, 0), max(prompt - kept, 0))
    ids, labels = ids[:kept] + ids[kept + spare :], labels[:kept] + labels[kept + spare :]
    ids, labels = ids[:most], labels[:most]
    left = sum(label != IGNORED for label in labels)
    return replace(
        item, ids=ids, labels=labels, prompt=prompt - spare, cut=item.cut + total - len(ids),
        lost=item.lost + learnt - left,
    )  # fmt: skip


def collected(examples: Sequence[Example], make: Callable[[Example], Any]) -> list[Any]:
    """What `make` makes of each example; the examples it refuses are told together, with their places."""
    made, bad = [], []
    for example in examples:
        try:
            made.append(make(example))
        except DataError as wrong:
            bad.append(f"{example.place or 'an example'}: {wrong}")
    faults = Faults(DataError, "these examples cannot be encoded")
    told(faults, bad, "examples")
    faults.raise_if_any()
    return made


def _checked(most: int) -> int:
    if most < LEAST:
        raise DataError(f"max_length is {most}, expected at least {LEAST} tokens")
    return most
