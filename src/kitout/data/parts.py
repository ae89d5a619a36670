"""Examples parted into what is learnt from, watched and measured on, so that nothing leaks from one into another.

Inputs that only case and white space tell apart stay on one side; copies count once; what is to be measured on is
chosen first, so it does not depend on how much is trained on, and classes keep their shares. Parts that the data names
are respected. It knows no file, no token and no model.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kitout.data.examples.examples import Example, Labelled
from kitout.data.read.tables import DataError

MOST_ANSWERS = 50  # more different answers than this are no closed set
LEARNT = ("train", "")  # parts that may be trained on; "" is what the source names no part for


@dataclass(frozen=True)
class Parts:
    """copies: examples left out because another of their part says the same. leaked: left out of train (or of
    validation) because their input is measured on. open: inputs of train that are answered in more than one way.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    copies: int = 0
    leaked: int = 0
    open: int = 0

    @property
    def majority(self) -> float | None:
        """The share of the test answers that always saying the commonest training answer gets right; None where
        answers are no small closed set.
        """
        taught, asked = (Counter(e.answer_text() for e in part) for part in (self.train, self.test))
        if not self.test or "" in taught or len(taught | asked) > MOST_ANSWERS or len(taught) < 2:
            return None
        return asked[taught.most_common(1)[0][0]] / len(self.test)

    def __str__(self) -> str:
        told = [f"train {len(self.train):,}", f"validation {len(self.validation):,}", f"test {len(self.test):,}"]
        if self.copies:
            told.append(f"copies left out: {self.copies:,}")
        if self.leaked:
            told.append(f"left out because they are measured on: {self.leaked:,}")
        return ", ".join(told)


def part(
    given: Mapping[str, Sequence[Example]], validation: float = 0.05, test: float = 0.1, seed: int = 0,
    classes: bool = True,
) -> Parts:  # fmt: skip
    """given: examples by part ("train", "validation", "test", "" for unnamed ones).

    validation, test: taken from what may be learnt where the data names no such part: a share below 1, else a number.
    classes: single labels are classes, each keeps its share; numbers to be learnt as such are none.
    """
    copies = 0
    held: dict[str, list[Example]] = {}
    for name in ("test", "validation", *LEARNT):
        kept, dropped = _unique(given.get(name, ()))
        held.setdefault("train" if name in LEARNT else name, []).extend(kept)
        copies += dropped
    pool, dropped = _unique(held["train"])  # named and unnamed ones may share some
    copies += dropped
    if not pool:
        raise DataError("there are no examples to learn from: the training part is empty")

    measured = {e.input_key for e in held["test"]}
    watched = [e for e in held["validation"] if e.input_key not in measured]
    measured |= {e.input_key for e in watched}
    rest = [e for e in pool if e.input_key not in measured]
    leaked = len(held["validation"]) - len(watched) + len(pool) - len(rest)
    if not rest:
        raise DataError(f"all {len(pool)} training examples are also in the validation or test part: nothing is left")

    total = len(rest)
    tested = held["test"]
    if "test" not in given:
        tested, rest = _taken(rest, _count(test, total, "test"), seed, "test", classes)
    if "validation" not in given:
        watched, rest = _taken(rest, _count(validation, total, "validation"), seed, "validation", classes)
    return Parts(tuple(rest), tuple(watched), tuple(tested), copies, leaked, _open(rest))


def _unique(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """The first of all that say the same, and how many were left out."""
    found: dict[str, Example] = {}
    count = 0
    for example in examples:
        found.setdefault(example.content_key, example)
        count += 1
    return list(found.values()), count - len(found)


def _open(examples: Iterable[Example]) -> int:
    counts = Counter(e.input_key for e in examples)
    return sum(count > 1 for count in counts.values())


def _count(wanted: float, total: int, name: str) -> int:
    if wanted < 0:
        raise DataError(f"{name} is {wanted:g}; expected a share below 1, or a number of examples, 0 for none")
    return max(round(wanted * total), 1) if 0 < wanted < 1 else int(wanted)


def _taken(
    pool: list[Example], wanted: int, seed: int, name: str, apart: bool
) -> tuple[list[Example], list[Example]]:  # fmt: skip
    """About `wanted` examples of the pool and the others, in their order. All of one input go together."""
    if not wanted:
        return [], pool
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(pool):
        groups.setdefault(example.input_key, []).append(i)
    if wanted > len(pool) // 2 or len(groups) < 2:
        raise DataError(
            f"{wanted} examples for {name} are more than half of the {len(pool)} that are left "
            f"({len(groups)} different inputs): take fewer, give a {name} file, or more data"
        )
    classes: dict[str, list[list[int]]] = {}
    for members in groups.values():
        classes.setdefault(_class(pool[members[0]]) if apart else "", []).append(members)
    dice = random.Random(f"{seed} {name}")
    chosen: set[int] = set()
    for label, quota in _quotas({c: len(g) for c, g in classes.items()}, round(wanted * len(groups) / len(pool))):
        drawn = classes[label]
        dice.shuffle(drawn)
        chosen.update(i for members in drawn[:quota] for i in members)
    if not chosen:
        raise DataError(
            f"none of the {len(pool)} examples can be taken for {name}: each of the {len(classes)} labels has one "
            f"input alone, which must be learnt; name the label's column, give a {name} file, or write data.{name}=0"
        )
    return [e for i, e in enumerate(pool) if i in chosen], [e for i, e in enumerate(pool) if i not in chosen]


def _class(example: Example) -> str:
    """What shares are kept of: single labels in words or whole numbers."""
    return example.answer_text() if isinstance(example, Labelled) and isinstance(example.label, str | int) else ""


def _quotas(sizes: Mapping[str, int], wanted: int) -> list[tuple[str, int]]:
    """`wanted` by the size of each class (largest remainders), at least one left of each; in a fixed order."""
    total = sum(sizes.values())
    wanted = max(wanted, 1)
    shares = {c: wanted * size / total for c, size in sizes.items()}
    quotas = {c: int(share) for c, share in shares.items()}
    order = sorted(shares, key=lambda c: (quotas[c] - shares[c], c))
    for c in order[: wanted - sum(quotas.values())]:
        quotas[c] += 1
    return [(c, min(quota, sizes[c] - 1) if len(sizes) > 1 else quota) for c, quota in sorted(quotas.items())]
