"""From a config's data to what a job learns, watches and is measured on: items by part, with what is worth telling.

The objective is told by the examples where it is not said. Sources of a mixture are parted together, so that nothing
leaks between them, and keep their weights. It knows examples and encoders, and nothing of kits or of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from kitout.data.encode import classification, generation
from kitout.data.encode.item import Item, digest
from kitout.data.examples.examples import Chat, Example, LabeledImage, Labelled, Tagged
from kitout.data.read.sources import load
from kitout.data.split import TRAINABLE_SPLITS, split_examples, split_images
from kitout.data.streaming import stream
from kitout.errors import ConfigError
from kitout.train.config.schema import DataConfig, SourceConfig
from kitout.train.setup.base_model import data_at
from kitout.train.setup.closed_answers import ClosedAnswers, closed_answers
from kitout.train.streamed import Streamed

LABELED = ("classify", "multilabel", "tokens")  # objectives with a set of labels
WRITING = ("causal", "seq2seq")  # objectives whose answers are texts
LOOKED_AT = 1000  # examples of a stream that are counted beforehand
Encode = Callable[[Sequence[Example]], list[Item]]


@dataclass(frozen=True)
class Sets:
    """train, validation, test: items (of images: indices). sets, weights: the parts of a mixture in train.

    names: labels in order. majority: the share of the commonest answer, or None. told: for the pre-flight. digest: of
    all items.
    """

    objective: str
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    names: tuple[str, ...] = ()
    sets: tuple[range, ...] = ()
    weights: tuple[float, ...] = ()
    majority: float | None = None
    told: tuple[str, ...] = ()
    digest: str = ""
    looked_at: Sequence[Any] = ()  # of a stream: what the pre-flight counts
    chat: bool = False
    images: Any = None
    answers: ClosedAnswers | None = None  # of a language model whose answers are a closed set


def text_sets(config: DataConfig, objective: str, tokenizer: Any, writes_after_reading: bool) -> Sets:
    """Every text objective. writes_after_reading: the model is an encoder-decoder."""
    if config.streaming:
        return _streamed(config, objective, tokenizer, writes_after_reading)
    loaded = [load(_given(source, config, first=k == 0), *_how(source), source.limit, config.seed)
              for k, source in enumerate(config.train)]  # fmt: skip
    owners = {id(e): k for k, one in enumerate(loaded) for held in one.parts.values() for e in held}
    given: dict[str, list[Example]] = {}
    for one in loaded:
        for name, held in one.parts.items():
            given.setdefault(name, []).extend(held)
    share = {name: 0.0 if isinstance(v, str) else v for name, v in _measured(config).items()}
    learnt = [e for name in TRAINABLE_SPLITS for e in given.get(name, ())]
    kind = told_by(learnt, objective, writes_after_reading) if learnt else objective
    splits = split_examples(given, share["validation"], share["test"], config.seed, stratify=kind != "regress")
    names = (config.labels or classification.label_set(splits.train)) if kind in LABELED else ()
    encoder = encoder_of(kind, tokenizer, config, names)
    train: list[Item] = []
    sets = []
    for k in range(len(loaded)):
        start = len(train)
        train += encoder([e for e in splits.train if owners[id(e)] == k])
        sets.append(range(start, len(train)))
    if any(not one for one in sets):
        empty = [config.train[k].path for k, one in enumerate(sets) if not one]
        raise ConfigError(f"nothing is left to learn from {', '.join(empty)}: all of it is measured on, or a copy")
    validation, test = encoder(list(splits.validation)), encoder(list(splits.test))
    told = [str(layout) for one in loaded for layout in one.layouts] + [str(splits)]
    return Sets(
        kind, train, validation, test, tuple(names), tuple(sets), tuple(s.weight for s in config.train),
        splits.majority_accuracy, tuple(told), digest([*train, *validation, *test]),
        chat=isinstance(splits.train[0], Chat),
        answers=closed_answers(train, [*validation, *test], config.labels) if kind in WRITING else None,
    )  # fmt: skip


def _measured(config: DataConfig) -> dict[str, str | float]:
    return {"validation": config.validation, "test": config.test}


def _given(source: SourceConfig, config: DataConfig, first: bool) -> Any:
    """What `load` reads: the source, with the files of the measured parts beside the first one."""
    files = {name: data_at(value) for name, value in _measured(config).items() if isinstance(value, str)}
    return {"train": data_at(source.path), **files} if files and first else data_at(source.path)


def _how(source: SourceConfig) -> tuple[str | None, dict[str, str] | None, str | None]:
    return (None if source.format == "auto" else source.format), (source.columns or None), source.instruction


def told_by(examples: Sequence[Example], asked: str, writes_after_reading: bool) -> str:
    """The objective that these examples can teach, if none was asked for."""
    first = examples[0]
    if isinstance(first, LabeledImage):
        raise ConfigError("data.train.format=image is for models that read images; this one reads text")
    if asked != "auto":
        return asked
    if isinstance(first, Tagged):
        return "tokens"
    if isinstance(first, Labelled):
        if isinstance(first.label, tuple):
            return "multilabel"
        return "regress" if _numbers([e.label for e in examples if isinstance(e, Labelled)]) else "classify"
    return "seq2seq" if writes_after_reading else "causal"


def _numbers(found: Sequence[Any]) -> bool:
    """Whether labels are numbers, not classes: a table without types writes them as words, whole ones are classes."""
    try:
        values = [float(label) for label in found]
    except (TypeError, ValueError):
        return False
    return any(isinstance(label, float) for label in found) or any(v % 1 for v in values if math.isfinite(v))


def encoder_of(kind: str, tokenizer: Any, config: DataConfig, names: Sequence[str]) -> Encode:
    """The encoder of an objective."""
    most = config.max_length
    if kind == "causal":
        return generation.Causal(tokenizer, most, config.learn, config.template)
    if kind == "seq2seq":
        return generation.Seq2Seq(tokenizer, most)
    if kind == "regress":
        return classification.Regress(tokenizer, most)
    makers: dict[str, Any] = {
        "classify": classification.Classify,
        "multilabel": classification.MultiLabel,
        "tokens": classification.TagTokens,
    }
    made: Encode = makers[kind](tokenizer, most, tuple(names))
    return made


def _streamed(config: DataConfig, objective: str, tokenizer: Any, writes_after_reading: bool) -> Sets:
    """Train is read as it is learnt from; what is measured on comes from the front, or from files of its own."""
    if len(config.train) > 1:
        raise ConfigError("data.streaming reads one source; join the files, or leave streaming out")
    (source,) = config.train
    form, columns, instruction = _how(source)
    streams = stream(_given(source, config, True), form, columns, instruction, config.seed)
    learnt = streams.get("train") or streams[""]
    measured: dict[str, list[Example]] = {}
    for name, value in _measured(config).items():
        if name in streams:
            measured[name] = list(streams[name])
            learnt = learnt.without(measured[name])
        elif isinstance(value, float) and 0 < value < 1:
            raise ConfigError(f"data.{name}={value} is a share of a stream, whose length nobody knows: write a number")
        else:
            taken = learnt.first(int(value)) if not isinstance(value, str) else []
            measured[name] = taken
            learnt = learnt.without(taken)
    looked_at = learnt.first(LOOKED_AT)
    kind = told_by(looked_at, objective, writes_after_reading)
    names = config.labels or () if kind in LABELED else ()
    if kind in LABELED and not names:
        raise ConfigError("data.streaming: the labels cannot be known beforehand; write data.labels=[...]")
    encoder = encoder_of(kind, tokenizer, config, names)
    validation, test = encoder(measured["validation"]), encoder(measured["test"])
    seen = encoder(looked_at)
    told = [str(layout) for layout in learnt.layouts] + [
        f"streamed; counted over the first {len(looked_at):,} examples"
    ]
    return Sets(
        kind, Streamed(learnt, encoder), validation, test, tuple(names), told=tuple(told),
        digest=digest([*seen, *validation, *test]), looked_at=seen, chat=isinstance(looked_at[0], Chat),
        answers=closed_answers(seen, [*validation, *test], config.labels) if kind in WRITING else None,
    )  # fmt: skip


def image_sets(config: DataConfig) -> Sets:
    """Images to classes; items are rows of one set, whose parts do not share a picture."""
    from kitout.data.read import image_folders

    if len(config.train) > 1:
        raise ConfigError("images come from one source: a folder of class folders, a table or an .npz")
    (source,) = config.train
    columns = source.columns
    if source.format not in ("auto", "image"):
        raise ConfigError(f"data.train.format={source.format}: this model reads images; write image or auto")
    path = Path(data_at(source.path))
    if (path / "images.npz").is_file():  # an embedded set is a folder with its licence beside it
        path = path / "images.npz"
    whole = image_folders.load(path, columns.get("image"), columns.get("label"), config.labels)
    for name, value in _measured(config).items():
        if isinstance(value, str):
            raise ConfigError(
                f"data.{name}={value!r}: for images put the files below {name}/ beside train/, "
                f"or name tables of paths train and {name}"
            )
    share = {name: 0.0 if isinstance(v, str) else v for name, v in _measured(config).items()}
    splits = split_images(whole, share["validation"], share["test"], config.seed, source.limit)
    ends = [0, *accumulate(map(len, (splits.train, splits.validation, splits.test)))]
    train, validation, test = (list(range(start, end)) for start, end in pairwise(ends))
    images = whole.pick([*splits.train, *splits.validation, *splits.test])
    return Sets(
        "images", train, validation, test, whole.names, majority=splits.majority_accuracy, told=(f"images: {splits}",),
        digest=images.digest, images=images,
    )  # fmt: skip
