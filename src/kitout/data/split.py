"""A set of images parted into what is learnt from and what is measured on, so that nothing leaks.

Exact duplicates count once, whatever their file names; classes keep their shares; the test images are chosen first, so
they do not depend on how many are trained on. Parts that the set itself names are respected. It opens no image.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kitout.data.images.image_set import Images
from kitout.data.read.tables import DataError, told
from kitout.errors import Faults


@dataclass(frozen=True)
class Split:
    """Disjoint by pixels. dropped: duplicates left out."""

    train: Images
    test: Images
    dropped: int

    @property
    def majority(self) -> float:
        """The share of the test images that the most frequent training label would get right."""
        common = Counter(self.train.labels).most_common(1)[0][0]
        return self.test.labels.count(common) / len(self.test)


def split(images: Images, test: int, train: int | None = None, seed: int = 0) -> Split:
    """At most `test` images to measure on, at most a third of a set that has no parts, and `train` of the rest.

    Where the set has parts, test is drawn from "test", or from "val" if there is none, and train from "train" alone.
    """
    measured = next((p for p in ("test", "val") if p in images.parts), None)
    if measured is None:
        kept = _unique(images)
        _check(images, kept)
        held = _drawn(images, kept, min(test, len(kept) // 3), seed, spare=1)
        rest = [i for i in kept if i not in set(held)]
        dropped = len(images) - len(kept)
    else:
        held = _drawn(images, [i for i, p in enumerate(images.parts) if p == measured], test, seed)
        everything_measured = {images.hashes[i] for i, p in enumerate(images.parts) if p != "train"}
        taught = [i for i in _unique(images) if images.parts[i] == "train"]
        rest = [i for i in taught if images.hashes[i] not in everything_measured]
        dropped = images.parts.count("train") - len(rest)
        if len({images.labels[i] for i in rest}) < 2:
            raise DataError(f"without the images that are also in {measured}, train has fewer than 2 classes")
    chosen = rest if train is None else _drawn(images, rest, train, seed)
    return Split(images.pick(chosen), images.pick(held), dropped)


def _unique(images: Images) -> list[int]:
    """One image of each group of copies: the first that carries the label most of its copies carry."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, (pixels, part) in enumerate(zip(images.hashes, images.parts, strict=True)):
        groups.setdefault((pixels, part in ("", "train")), []).append(i)
    kept = []
    for group in groups.values():
        common = Counter(images.labels[i] for i in group).most_common(1)[0][0]
        kept.append(next(i for i in group if images.labels[i] == common))
    return sorted(kept)


def _check(images: Images, kept: Sequence[int]) -> None:
    counts = Counter(images.labels[i] for i in kept)
    few = [
        f"class {name!r} has {counts[i]} different images: 2 are needed, one to learn from and one to measure"
        for i, name in enumerate(images.names)
        if counts[i] < 2
    ]
    faults = Faults(DataError, "this set cannot be split")
    told(faults, few, "classes")
    faults.raise_if_any()


def _drawn(images: Images, pool: Sequence[int], wanted: int, seed: int, spare: int = 0) -> list[int]:
    """`wanted` of the pool, each class by its share (largest remainders), never all but `spare` of a class."""
    dice = random.Random(seed)
    classes: dict[int, list[int]] = {}
    for i in pool:
        classes.setdefault(images.labels[i], []).append(i)
    wanted = min(wanted, len(pool))
    if wanted < 1:
        raise DataError(f"{wanted} of {len(pool)} images were asked for: at least 1 is needed")
    shares = {label: wanted * len(held) / len(pool) for label, held in classes.items()}
    quota = {label: int(share) for label, share in shares.items()}
    order = sorted(shares, key=lambda label: (quota[label] - shares[label], label))  # largest remainder first
    for label in order[: wanted - sum(quota.values())]:
        quota[label] += 1
    chosen: list[int] = []
    for label, held in sorted(classes.items()):
        dice.shuffle(held)
        chosen += held[: min(quota[label], len(held) - spare)]
    return sorted(chosen)
