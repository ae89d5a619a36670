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
from kitout.data.encode.item import EncodedExample, digest
from kitout.data.examples.examples import Chat, Example, LabeledImage, LabeledText, TaggedWords
from kitout.data.read.sources import load_examples
from kitout.data.split import TRAINABLE_SPLITS, split_examples, split_images
from kitout.data.streaming import StreamedItems, open_stream
from kitout.errors import ConfigError
from kitout.train.config.schema import DataConfig, SourceConfig
from kitout.train.setup.base_model import resolve_data
from kitout.train.setup.closed_answers import ClosedAnswers, find_closed_answers

LABELED_OBJECTIVES = ("classification", "multilabel", "token_classification")  # objectives with a set of labels
GENERATIVE_OBJECTIVES = ("causal_lm", "seq2seq_lm")  # objectives whose answers are texts
PREVIEW_EXAMPLES = 1000  # examples of a stream that are counted beforehand
EncodeFn = Callable[[Sequence[Example]], list[EncodedExample]]


@dataclass(frozen=True)
class Datasets:
    """train, validation, test: items (of images: indices). sets, weights: the parts of a mixture in train.

    names: labels in order. majority: the share of the commonest answer, or None. told: for the pre-flight. digest: of
    all items.
    """

    objective: str
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    label_names: tuple[str, ...] = ()
    mixture_ranges: tuple[range, ...] = ()
    mixture_weights: tuple[float, ...] = ()
    majority_accuracy: float | None = None
    reading_notes: tuple[str, ...] = ()
    digest: str = ""
    preview: Sequence[Any] = ()  # of a stream: what the pre-flight counts
    is_chat: bool = False
    images: Any = None
    answers: ClosedAnswers | None = None  # of a language model whose answers are a closed set


def load_text_datasets(config: DataConfig, objective: str, tokenizer: Any, is_encoder_decoder: bool) -> Datasets:
    """Every text objective. writes_after_reading: the model is an encoder-decoder."""
    if config.streaming:
        return _load_streamed(config, objective, tokenizer, is_encoder_decoder)
    loaded = [
        load_examples(
            _tables_to_read(source, config, is_first=k == 0), *_reading_options(source), source.limit, config.seed
        )
        for k, source in enumerate(config.train)
    ]
    owners = {id(e): k for k, one in enumerate(loaded) for held in one.splits.values() for e in held}
    given: dict[str, list[Example]] = {}
    for one in loaded:
        for name, held in one.splits.items():
            given.setdefault(name, []).extend(held)
    share = {name: 0.0 if isinstance(v, str) else v for name, v in _held_out(config).items()}
    learnt = [e for name in TRAINABLE_SPLITS for e in given.get(name, ())]
    kind = infer_objective(learnt, objective, is_encoder_decoder) if learnt else objective
    splits = split_examples(given, share["validation"], share["test"], config.seed, stratify=kind != "regression")
    names = (config.labels or classification.label_set(splits.train)) if kind in LABELED_OBJECTIVES else ()
    encoder = encoder_for(kind, tokenizer, config, names)
    train: list[EncodedExample] = []
    sets = []
    for k in range(len(loaded)):
        start = len(train)
        train += encoder([e for e in splits.train if owners[id(e)] == k])
        sets.append(range(start, len(train)))
    if any(not one for one in sets):
        empty = [config.train[k].path for k, one in enumerate(sets) if not one]
        raise ConfigError(f"nothing is left to learn from {', '.join(empty)}: all of it is measured on, or a copy")
    validation, test = encoder(list(splits.validation)), encoder(list(splits.test))
    told = [str(layout) for one in loaded for layout in one.readings] + [str(splits)]
    return Datasets(
        kind,
        train,
        validation,
        test,
        tuple(names),
        tuple(sets),
        tuple(s.weight for s in config.train),
        splits.majority_accuracy,
        tuple(told),
        digest([*train, *validation, *test]),
        is_chat=isinstance(splits.train[0], Chat),
        answers=find_closed_answers(train, [*validation, *test], config.labels)
        if kind in GENERATIVE_OBJECTIVES
        else None,
    )


def _held_out(config: DataConfig) -> dict[str, str | float]:
    return {"validation": config.validation, "test": config.test}


def _tables_to_read(source: SourceConfig, config: DataConfig, is_first: bool) -> Any:
    """What `load` reads: the source, with the files of the measured parts beside the first one."""
    files = {name: resolve_data(value) for name, value in _held_out(config).items() if isinstance(value, str)}
    return {"train": resolve_data(source.path), **files} if files and is_first else resolve_data(source.path)


def _reading_options(source: SourceConfig) -> tuple[str | None, dict[str, str] | None, str | None]:
    return (None if source.format == "auto" else source.format), (source.columns or None), source.system_prompt


def infer_objective(examples: Sequence[Example], requested: str, is_encoder_decoder: bool) -> str:
    """The objective that these examples can teach, if none was asked for."""
    first = examples[0]
    if isinstance(first, LabeledImage):
        raise ConfigError("data.train.format=image is for models that read images; this one reads text")
    if requested != "auto":
        return requested
    if isinstance(first, TaggedWords):
        return "token_classification"
    if isinstance(first, LabeledText):
        if isinstance(first.label, tuple):
            return "multilabel"
        return (
            "regression"
            if _are_numbers([e.label for e in examples if isinstance(e, LabeledText)])
            else "classification"
        )
    return "seq2seq_lm" if is_encoder_decoder else "causal_lm"


def _are_numbers(labels: Sequence[Any]) -> bool:
    """Whether labels are numbers, not classes: a table without types writes them as words, whole ones are classes."""
    try:
        values = [float(label) for label in labels]
    except (TypeError, ValueError):
        return False
    return any(isinstance(label, float) for label in labels) or any(v % 1 for v in values if math.isfinite(v))


def encoder_for(objective: str, tokenizer: Any, config: DataConfig, label_names: Sequence[str]) -> EncodeFn:
    """The encoder of an objective."""
    most = config.max_length
    if objective == "causal_lm":
        return generation.CausalEncoder(tokenizer, most, config.train_on, config.chat_template_kwargs)
    if objective == "seq2seq_lm":
        return generation.Seq2SeqEncoder(tokenizer, most)
    if objective == "regression":
        return classification.RegressionEncoder(tokenizer, most)
    makers: dict[str, Any] = {
        "classification": classification.ClassEncoder,
        "multilabel": classification.MultiLabelEncoder,
        "token_classification": classification.TokenClassEncoder,
    }
    made: EncodeFn = makers[objective](tokenizer, most, tuple(label_names))
    return made


def _load_streamed(config: DataConfig, objective: str, tokenizer: Any, is_encoder_decoder: bool) -> Datasets:
    """Train is read as it is learnt from; what is measured on comes from the front, or from files of its own."""
    if len(config.train) > 1:
        raise ConfigError("data.streaming reads one source; join the files, or leave streaming out")
    (source,) = config.train
    form, columns, instruction = _reading_options(source)
    streams = open_stream(_tables_to_read(source, config, True), form, columns, instruction, config.seed)
    learnt = streams.get("train") or streams[""]
    measured: dict[str, list[Example]] = {}
    for name, value in _held_out(config).items():
        if name in streams:
            measured[name] = list(streams[name])
            learnt = learnt.excluding(measured[name])
        elif isinstance(value, float) and 0 < value < 1:
            raise ConfigError(f"data.{name}={value} is a share of a stream, whose length nobody knows: write a number")
        else:
            taken = learnt.take_unique(int(value)) if not isinstance(value, str) else []
            measured[name] = taken
            learnt = learnt.excluding(taken)
    looked_at = learnt.take_unique(PREVIEW_EXAMPLES)
    kind = infer_objective(looked_at, objective, is_encoder_decoder)
    names = config.labels or () if kind in LABELED_OBJECTIVES else ()
    if kind in LABELED_OBJECTIVES and not names:
        raise ConfigError("data.streaming: the labels cannot be known beforehand; write data.labels=[...]")
    encoder = encoder_for(kind, tokenizer, config, names)
    validation, test = encoder(measured["validation"]), encoder(measured["test"])
    seen = encoder(looked_at)
    told = [str(layout) for layout in learnt.readings] + [
        f"streamed; counted over the first {len(looked_at):,} examples"
    ]
    return Datasets(
        kind,
        StreamedItems(learnt, encoder),
        validation,
        test,
        tuple(names),
        reading_notes=tuple(told),
        digest=digest([*seen, *validation, *test]),
        preview=seen,
        is_chat=isinstance(looked_at[0], Chat),
        answers=find_closed_answers(seen, [*validation, *test], config.labels)
        if kind in GENERATIVE_OBJECTIVES
        else None,
    )


def load_image_datasets(config: DataConfig) -> Datasets:
    """Images to classes; items are rows of one set, whose parts do not share a picture."""
    from kitout.data.read import image_folders

    if len(config.train) > 1:
        raise ConfigError("images come from one source: a folder of class folders, a table or an .npz")
    (source,) = config.train
    columns = source.columns
    if source.format not in ("auto", "image"):
        raise ConfigError(f"data.train.format={source.format}: this model reads images; write image or auto")
    path = Path(resolve_data(source.path))
    if (path / "images.npz").is_file():  # an embedded set is a folder with its licence beside it
        path = path / "images.npz"
    whole = image_folders.load_images(path, columns.get("image"), columns.get("label"), config.labels)
    for name, value in _held_out(config).items():
        if isinstance(value, str):
            raise ConfigError(
                f"data.{name}={value!r}: for images put the files below {name}/ beside train/, "
                f"or name tables of paths train and {name}"
            )
    share = {name: 0.0 if isinstance(v, str) else v for name, v in _held_out(config).items()}
    splits = split_images(whole, share["validation"], share["test"], config.seed, source.limit)
    ends = [0, *accumulate(map(len, (splits.train, splits.validation, splits.test)))]
    train, validation, test = (list(range(start, end)) for start, end in pairwise(ends))
    images = whole.subset([*splits.train, *splits.validation, *splits.test])
    return Datasets(
        "image_classification",
        train,
        validation,
        test,
        whole.label_names,
        majority_accuracy=splits.majority_accuracy,
        reading_notes=(f"images: {splits}",),
        digest=images.digest,
        images=images,
    )
