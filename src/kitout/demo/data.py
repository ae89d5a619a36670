"""Labelled texts from a file the user names: read, cleaned of duplicates, split so that no test text is trained on.

Reads .jsonl, .json (a list), .csv and .tsv; finds the text and the label column or is told them. Two texts count as the
same when nothing but case, punctuation, links, @names or a leading "RT" tells them apart. It knows no model, token or
prompt, and it opens files only to read.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.errors import Faults, KitoutError

TEXT_COLUMNS = ("text", "tweet", "sentence", "review", "content", "message", "comment", "body", "input", "prompt")
LABEL_COLUMNS = ("label", "sentiment", "category", "class", "target", "intent", "topic", "answer", "output", "response")
MOST_LABELS = 30  # more different labels than this are no classes: probably the wrong column
SHOWN = 5  # faults of one kind told in full


class DataError(KitoutError, ValueError):
    """A data file that is missing, unreadable or not what the demo can learn from."""


Row = tuple[int, dict[str, Any]]  # line, columns


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
    rows = _rows(path)
    text, label = _columns(path, rows, text, label)
    faults, examples = Faults(DataError, str(path)), []
    bad = 0
    for line, row in rows:
        found, name = _word(row.get(text)), _word(row.get(label))
        if found and name:
            examples.append(Example(found, name))
            continue
        bad += 1
        if bad <= SHOWN:
            shown = f"{text!r} is {row.get(text)!r} and {label!r} is {row.get(label)!r}"
            faults.add(f"line {line}: {shown}; both must hold something")
    if bad > SHOWN:
        faults.add(f"and {bad - SHOWN} more such rows")
    faults.raise_if_any()
    return examples


def _word(value: object) -> str:
    return "" if value is None or isinstance(value, list | dict) else str(value).strip()


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in READERS) if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}" + (f"; beside it: {', '.join(near[:8])}" if near else ""))
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown format {path.suffix or '(no ending)'}; use {', '.join(READERS)}")
    try:
        rows = read(path)
    except UnicodeDecodeError as wrong:
        raise DataError(f"{path} is not UTF-8 (byte {wrong.start}); convert it, e.g. with iconv -t UTF-8") from wrong
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _jsonl(path: Path) -> list[Row]:
    faults, rows, bad = Faults(DataError, str(path)), [], 0
    for line, words in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not words.strip():
            continue
        try:
            row = json.loads(words)
            fault = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"
        except json.JSONDecodeError as wrong:
            row, fault = None, f"not JSON ({wrong.msg}, column {wrong.colno})"
        if not fault:
            rows.append((line, row))
            continue
        bad += 1
        if bad <= SHOWN:
            faults.add(f"line {line}: {fault}: {words.strip()[:60]!r}")
    if bad > SHOWN:
        faults.add(f"and {bad - SHOWN} more such lines")
    faults.raise_if_any()
    return rows


def _json(path: Path) -> list[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as wrong:
        raise DataError(
            f"{path} line {wrong.lineno}: not JSON ({wrong.msg}); if one object per line: name it .jsonl"
        ) from wrong
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path} must hold a list of objects, found a {type(found).__name__}")
    return list(enumerate(found, start=1))


def _table(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table}


def _columns(path: Path, rows: Sequence[Row], text: str | None, label: str | None) -> tuple[str, str]:
    present = [str(column) for column in rows[0][1]]
    faults = Faults(DataError, f"{path} (columns: {', '.join(present)})")
    chosen = []
    for role, asked, usual in (("text", text, TEXT_COLUMNS), ("label", label, LABEL_COLUMNS)):
        if asked is not None and asked not in present:
            faults.add(f"there is no column {asked!r} for the {role}")
        found = asked or next((c for name in usual for c in present if c.lower() == name), None)
        if found is None:
            faults.add(f"none of the columns looks like the {role}; say which with --{role} NAME")
        chosen.append(found or "")
    faults.raise_if_any()
    return chosen[0], chosen[1]


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
