"""Labelled texts from a file the user names: read, cleaned of duplicates, split so that no test text is trained on.

Reads any table that `kitout.data` reads; finds the text and the label column or is told them. Two texts count as the
same when nothing but case, punctuation, links, @names or a leading "RT" tells them apart. It knows no model, token or
prompt.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kitout.data.read.tables import DataError, columns, rows, told, word
from kitout.errors import Faults

TEXT_COLUMNS = ("text", "tweet", "sentence", "review", "content", "message", "comment", "body", "input", "prompt")
LABEL_COLUMNS = ("label", "sentiment", "category", "class", "target", "intent", "topic", "answer", "output", "response")
MOST_LABELS = 30  # more different labels than this are no classes: probably the wrong column


@dataclass(frozen=True)
class Example:
    text: str
    label: str


@dataclass(frozen=True)
class Split:
    """Disjoint by normalised text. `labels` in the order of the data's own frequency, most frequent first."""

    train: list[Example]
    test: list[Example]
    labels: list[str]
    dropped: int  # duplicates left out

    @property
    def majority(self) -> float:
        """The share of the test set that the most frequent training label would get right."""
        common = Counter(e.label for e in self.train).most_common(1)[0][0]
        return sum(e.label == common for e in self.test) / len(self.test)


def load(path: Path, text: str | None = None, label: str | None = None) -> list[Example]:
    """The rows of a file as examples. Every fault of the file is told at once, with its line."""
    found = rows(path)
    text, label = columns(path, found, {"text": (text, TEXT_COLUMNS), "label": (label, LABEL_COLUMNS)})
    examples, bad = [], []
    for line, row in found:
        said, name = word(row.get(text)), word(row.get(label))
        if said and name:
            examples.append(Example(said, name))
        else:
            shown = f"{text!r} is {row.get(text)!r} and {label!r} is {row.get(label)!r}"
            bad.append(f"line {line}: {shown}; both must hold something")
    faults = Faults(DataError, str(path))
    told(faults, bad, "rows")
    faults.raise_if_any()
    return examples


def normal(text: str) -> str:
    """What is left of a text when case, punctuation, links, @names and a leading RT do not count."""
    bare = re.sub(r"https?://\S+|@\w+|^\s*rt\b", " ", text.lower())
    return " ".join(re.findall(r"\w+", bare)) or text.strip()


def unique(examples: Iterable[Example]) -> list[Example]:
    """One example per normalised text: its first wording, the label most of its copies carry (a tie: the first)."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(normal(example.text), []).append(example)
    common = (Counter(e.label for e in group).most_common(1)[0][0] for group in groups.values())
    return [Example(group[0].text, label) for group, label in zip(groups.values(), common, strict=True)]


def split(examples: Sequence[Example], train: int, test: int, seed: int) -> Split:
    """Shuffled with the seed; test texts are taken first, so they do not depend on the size of the training set."""
    kept = unique(examples)
    labels = [label for label, _ in Counter(e.label for e in kept).most_common()]
    faults = Faults(DataError, "this data cannot be learnt from")
    if not 2 <= len(labels) <= MOST_LABELS:
        some = ", ".join(labels[:6])
        faults.add(f"it has {len(labels)} different labels ({some}), expected 2 to {MOST_LABELS}: the right column?")
    test = min(test, len(kept) // 3)  # a small file keeps two thirds for training
    if test < 20:
        faults.add(f"{len(kept)} different texts are too few: at least 60 are needed to train and to measure")
    faults.raise_if_any()
    random.Random(seed).shuffle(kept)
    return Split(kept[test : test + train], kept[:test], labels, len(examples) - len(kept))


def digest(examples: Iterable[Example]) -> str:
    """A fingerprint of texts and labels in their order."""
    seen = hashlib.sha256()
    for example in examples:
        seen.update(json.dumps([example.text, example.label]).encode())
    return seen.hexdigest()
