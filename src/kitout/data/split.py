"""Train, validation and test without leaks, for texts and images alike.

Three functions say all that is known of an example: its input (or group), what makes it a duplicate, and its stratum,
whose proportion every split keeps. Exact copies count once, and inputs that are nearly equal stay in one split. Test is
taken first, so it does not depend on how much is trained on. Splits that the data name are respected. It opens no file
and no image.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kitout.data.examples.examples import Example, LabeledText
from kitout.data.examples.preferences import PREFERENCE_KINDS, UnpairedAnswer
from kitout.data.read.tables import DataError
from kitout.data.split_groups import find_units, sample_units

if TYPE_CHECKING:
    from kitout.data.images.image_set import ImageSet  # needs pillow

MAX_ANSWERS = 50  # more different answers than this are not a closed set
TRAINABLE_SPLITS = ("train", "")  # what may be trained on; "": the source names no split

T = TypeVar("T")


@dataclass(frozen=True)
class SplitKeys(Generic[T]):
    """How examples of one kind are compared."""

    input_key: Callable[[T], Hashable]
    """The same for inputs that may not be in two splits."""
    content_key: Callable[[T], Hashable]
    """The same for duplicates, of which one is kept."""
    stratum: Callable[[T], Any]
    """What keeps its proportion in every split; the values of one set must sort."""
    keep_most_frequent: bool = False
    """Of duplicates in different strata keep the first of the most frequent one; else the first of all."""
    has_groups: bool = False
    """Whether many different inputs have one input key, because they are of one group."""


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Train, validation and test: no input is in two of them, each is in the order of the data."""

    train: tuple[T, ...]
    """What is trained on."""
    validation: tuple[T, ...]
    """What is evaluated during training."""
    test: tuple[T, ...]
    """What is evaluated at the end."""
    num_duplicates: int = 0
    """Examples removed because another of their split is the same."""
    num_leaks: int = 0
    """Examples removed from train (or from validation) because their input or group is in test or validation."""
    num_ambiguous: int = 0
    """Inputs of train that have several different answers."""
    majority_accuracy: float | None = None
    """Accuracy on test of always answering with train's majority class; None without a closed set."""

    def __str__(self) -> str:
        sizes = {"train": self.train, "validation": self.validation, "test": self.test}
        lines = [f"{name} {len(split):,}" for name, split in sizes.items()]
        if self.num_duplicates:
            lines.append(f"duplicates removed: {self.num_duplicates:,}")
        if self.num_leaks:
            lines.append(f"leaks removed: {self.num_leaks:,}")
        return ", ".join(lines)


def split_examples(
    examples_by_split: Mapping[str, Sequence[Example]], validation: float = 0.05, test: float = 0.1, seed: int = 0,
    stratify: bool = True,
) -> Splits[Example]:  # fmt: skip
    """examples_by_split: "train", "validation", "test", and "" for examples without a named split.

    validation, test: how much is taken from what may be trained on, if the data name no such split: a fraction below
    1, else a number. stratify: single labels keep their proportions; not for numbers of a regression. Examples of one
    group are in one split.
    """
    every = [example for examples in examples_by_split.values() for example in examples]
    has_groups = any(example.group for example in every)
    units = find_units((example.input_key, example.group) for example in every) if has_groups else {}
    keys = SplitKeys[Example](
        lambda example: units.get(example.input_key, example.input_key),
        lambda example: example.exact_key,
        _label if stratify else lambda _: "",
        has_groups=has_groups,
    )
    seeds = {name: f"{seed} {name}" for name in ("test", "validation")}
    splits = split_by(examples_by_split, keys, validation, test, seeds)
    train_answers, test_answers = ([e.answer_text() for e in split] for split in (splits.train, splits.test))
    answers = {*train_answers, *test_answers}
    different_answers = {(e.input_key, answer) for e, answer in zip(splits.train, train_answers, strict=True)}
    num_ambiguous = sum(count > 1 for count in Counter(key for key, _ in different_answers).values())
    has_one_answer = not any(isinstance(example, PREFERENCE_KINDS) for example in splits.train[:1])
    is_closed = has_one_answer and "" not in train_answers and len({*train_answers}) > 1 and len(answers) <= MAX_ANSWERS
    majority_accuracy = _majority_accuracy(train_answers, test_answers) if is_closed else None
    return replace(splits, majority_accuracy=majority_accuracy, num_ambiguous=num_ambiguous)


def split_images(
    images: ImageSet, validation: float = 0.05, test: float = 0.1, seed: int = 0, limit: int | None = None
) -> Splits[int]:
    """Indices into the set. Two images are the same if their pixels are, whatever their files are called.

    validation, test: as for examples, at most a third of what is left. limit: of images to train and validate on.
    """
    keys = SplitKeys[int](
        images.hashes.__getitem__, images.hashes.__getitem__, images.labels.__getitem__, keep_most_frequent=True
    )
    indices_by_split = {
        name: [i for i, split in enumerate(images.splits) if split == name] for name in dict.fromkeys(images.splits)
    }
    seeds = {"test": seed, "train": seed, "validation": seed + 1}
    splits = split_by(indices_by_split, keys, validation, test, seeds, limit, at_most_a_third=True)
    train_labels, test_labels = ([images.labels[i] for i in split] for split in (splits.train, splits.test))
    return replace(splits, majority_accuracy=_majority_accuracy(train_labels, test_labels))


def split_by(
    examples_by_split: Mapping[str, Sequence[T]], keys: SplitKeys[T], validation: float, test: float,
    seeds: Mapping[str, int | str], limit: int | None = None, at_most_a_third: bool = False,
) -> Splits[T]:  # fmt: skip
    """See `split_examples`. seeds: of each split that is sampled. limit: of examples to train and validate on.

    at_most_a_third: a split that is requested too large is taken smaller instead of refused.
    """
    num_duplicates = 0
    named: dict[str, list[T]] = {}
    for name in ("test", "validation", *TRAINABLE_SPLITS):
        kept, dropped = _without_duplicates(examples_by_split.get(name, ()), keys)
        named.setdefault("train" if name in TRAINABLE_SPLITS else name, []).extend(kept)
        num_duplicates += dropped
    pool, dropped = _without_duplicates(named["train"], keys)  # named and unnamed ones may share some
    num_duplicates += dropped
    if not pool:
        raise DataError("there are no examples to train on: the train split is empty")

    held_out = {keys.input_key(e) for e in named["test"]}
    validation_examples = [e for e in named["validation"] if keys.input_key(e) not in held_out]
    held_out |= {keys.input_key(e) for e in validation_examples}
    rest = [e for e in pool if keys.input_key(e) not in held_out]
    num_leaks = len(named["validation"]) - len(validation_examples) + len(pool) - len(rest)
    if not rest:
        shared = "of groups that are in" if keys.has_groups else "also in"
        raise DataError(f"all {len(pool)} training examples are {shared} validation or test: nothing is left")

    total, test_examples = len(rest), named["test"]
    if "test" not in examples_by_split:
        num_examples = _count(test, total, "test")
        num_examples = min(num_examples, len(rest) // 3) if at_most_a_third else num_examples
        test_examples, rest = _take_split(rest, num_examples, seeds, "test", keys)
    if limit is not None and limit < len(rest):
        sampled = _sample_stratified(rest, limit, seeds["train"], keys, spare=0)
        rest = [e for i, e in enumerate(rest) if i in sampled]
    if "validation" not in examples_by_split:
        num_examples = _count(validation, total, "validation")
        num_examples = min(num_examples, len(rest) // 3) if at_most_a_third else num_examples
        validation_examples, rest = _take_split(rest, num_examples, seeds, "validation", keys)
    return Splits(tuple(rest), tuple(validation_examples), tuple(test_examples), num_duplicates, num_leaks)


def _label(example: Example) -> str:
    """Single labels that are names or whole numbers are classes; answers are wanted or not."""
    if isinstance(example, UnpairedAnswer):
        return str(example.is_desirable)
    return example.answer_text() if isinstance(example, LabeledText) and isinstance(example.label, str | int) else ""


def _majority_accuracy(train: Sequence[Hashable], test: Sequence[Hashable]) -> float | None:
    return test.count(Counter(train).most_common(1)[0][0]) / len(test) if test else None


def _without_duplicates(examples: Sequence[T], keys: SplitKeys[T]) -> tuple[list[T], int]:
    """One of each group of duplicates, in order, and how many were removed."""
    groups: dict[Hashable, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(keys.content_key(example), []).append(i)
    kept = [group[0] for group in groups.values()]
    if keys.keep_most_frequent:
        kept = []
        for group in groups.values():
            strata = [keys.stratum(examples[i]) for i in group]
            kept.append(group[strata.index(Counter(strata).most_common(1)[0][0])])
        kept.sort()
    return [examples[i] for i in kept], len(examples) - len(kept)


def _count(requested: float, total: int, name: str) -> int:
    if requested < 0:
        raise DataError(f"{name} is {requested:g}; expected a fraction below 1, or a number of examples, 0 for none")
    return max(round(requested * total), 1) if 0 < requested < 1 else int(requested)


def _take_split(
    pool: list[T], num_examples: int, seeds: Mapping[str, int | str], name: str, keys: SplitKeys[T]
) -> tuple[list[T], list[T]]:
    """About `num_examples` of the pool and the others, in their order."""
    if not num_examples:
        return [], pool
    num_inputs = len(set(map(keys.input_key, pool)))
    if num_examples > len(pool) // 2 or num_inputs < 2:
        raise DataError(
            f"{num_examples} examples for {name} are more than half of the {len(pool)} that are left "
            f"({num_inputs} different {'groups' if keys.has_groups else 'inputs'}): take fewer, give a {name} file, or "
            "more data"
        )
    if keys.has_groups:
        taken = sample_units(pool, num_examples, seeds[name], keys.input_key, keys.stratum)
        if not taken:
            smallest = min(Counter(map(keys.input_key, pool)).values())
            raise DataError(
                f"no group fits into the {num_examples} examples for {name}: the smallest of the {num_inputs} groups "
                f"has {smallest}; set data.{name} to {2 * smallest} or more, or to 0, or give a {name} file"
            )
        return [e for i, e in enumerate(pool) if i in taken], [e for i, e in enumerate(pool) if i not in taken]
    taken = _sample_stratified(pool, num_examples, seeds[name], keys, spare=1)
    if not taken:
        num_strata = len(set(map(keys.stratum, pool)))
        raise DataError(
            f"none of the {len(pool)} examples can be taken for {name}: each of the {num_strata} labels has only "
            f"one input, which must be trained on; name the label's column, give a {name} file, or set data.{name}=0"
        )
    return [e for i, e in enumerate(pool) if i in taken], [e for i, e in enumerate(pool) if i not in taken]


def _sample_stratified(
    pool: Sequence[T], num_examples: int, seed: int | str, keys: SplitKeys[T], spare: int
) -> set[int]:
    """Indices of about `num_examples`, from each stratum in proportion; all examples of one input together.

    spare: inputs that stay in every stratum, if there are several strata.
    """
    inputs: dict[Hashable, list[int]] = {}
    for i, example in enumerate(pool):
        inputs.setdefault(keys.input_key(example), []).append(i)
    strata: dict[Any, list[list[int]]] = {}
    for members in inputs.values():
        strata.setdefault(keys.stratum(pool[members[0]]), []).append(members)
    rng = random.Random(seed)
    sampled: set[int] = set()
    sizes = {stratum: len(groups) for stratum, groups in strata.items()}
    for stratum, quota in _compute_quotas(sizes, round(num_examples * len(inputs) / len(pool)), spare):
        groups = strata[stratum]
        rng.shuffle(groups)
        sampled.update(i for members in groups[:quota] for i in members)
    return sampled


def _compute_quotas(sizes: Mapping[Any, int], num_examples: int, spare: int) -> list[tuple[Any, int]]:
    """`num_examples` in proportion to the strata (largest remainders), `spare` left of each; in a fixed order."""
    total, num_examples = sum(sizes.values()), max(num_examples, 1)
    exact = {stratum: num_examples * size / total for stratum, size in sizes.items()}
    quotas = {stratum: int(quota) for stratum, quota in exact.items()}
    order = sorted(exact, key=lambda stratum: (quotas[stratum] - exact[stratum], stratum))
    for stratum in order[: num_examples - sum(quotas.values())]:
        quotas[stratum] += 1
    has_several = len(sizes) > 1
    return [(stratum, min(quota, sizes[stratum] - spare) if has_several else quota)
            for stratum, quota in sorted(quotas.items())]  # fmt: skip
