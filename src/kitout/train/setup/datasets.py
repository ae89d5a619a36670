"""From a config's data to the datasets of a job: encoded examples by split, and what the pre-flight says of them.

The examples decide the objective where the config does not. Sources of a mixture are split together, so that nothing
leaks between them, and keep their weights. It knows examples, and nothing of kits or of the loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from kitout.data.encode import classification
from kitout.data.encode.answers import dropped_text
from kitout.data.encode.generation import encode_good
from kitout.data.encode.item import EncodedExample, digest
from kitout.data.encode.languages import Languages, find_languages
from kitout.data.examples.alignment_hint import refuse_for_training
from kitout.data.examples.examples import Example, LabeledImage
from kitout.data.examples.formats import TableReading
from kitout.data.examples.preferences import is_chat
from kitout.data.read.row_sample import MAX_IMAGES, RowSample
from kitout.data.read.sources import check_few_skipped, load_examples
from kitout.data.read.tables import StreamedMessages
from kitout.data.split import TRAINABLE_SPLITS, split_examples, split_images
from kitout.data.streaming import StreamedItems, open_stream
from kitout.data.suspicions import warn_of_remarks
from kitout.errors import BadRows, ConfigError, DataError, UnusableFormat
from kitout.train.config.schema import DataConfig, SourceConfig
from kitout.train.objectives.tasks import TASKS, TRAINING, EncodeFn, EncoderSettings, Task
from kitout.train.setup.closed_answers import ClosedAnswers, find_closed_answers
from kitout.train.setup.find_inputs import hint_of_names, resolve_data
from kitout.train.setup.job_datasets import Datasets, messages_by_split
from kitout.train.setup.lengths import TextLengths, requested_lengths
from kitout.train.setup.reading_progress import ReadingProgress
from kitout.train.setup.sample_input import short_example

ENCODE_CHUNK = 20_000  # examples between two reports
PREVIEW_EXAMPLES = 1000  # examples of a stream that are counted beforehand


def load_datasets(
    config: DataConfig, objective: str | Task, tokenizer: Any, is_encoder_decoder: bool,
    lengths: TextLengths | None = None,
    log: Callable[[str], None] = lambda _line: None, sample: RowSample | None = None,
) -> Datasets:  # fmt: skip
    """The datasets of one job. objective: by name, "auto", or a task of another table. tokenizer: None for images.

    is_encoder_decoder: of the model.

    sample: draws the examples that a dry run looks at; None: all.
    """
    try:
        if tokenizer is None:
            return load_image_datasets(config, sample)
        progress = ReadingProgress(log)
        return load_text_datasets(config, objective, tokenizer, is_encoder_decoder, lengths, progress, sample)
    except UnusableFormat as error:
        if _kinds(objective) != TRAINING:
            raise
        paths = [source.path for source in config.train]
        path = next((path for path in paths if Path(path).name == error.reading.source), paths[0])
        raise refuse_for_training(error, path) from error
    except BadRows as error:
        raise DataError(f"{error}\n  correct them, or leave them out: data.bad_rows=skip") from error
    except DataError as error:
        if hint := hint_of_names(config):
            raise DataError(f"{error}{hint}") from error
        raise


def load_text_datasets(
    config: DataConfig, objective: str | Task, tokenizer: Any, is_encoder_decoder: bool,
    lengths: TextLengths | None = None, progress: ReadingProgress | None = None, sample: RowSample | None = None,
) -> Datasets:  # fmt: skip
    """Texts of every objective. is_encoder_decoder: of the model. lengths: None: by config and tokenizer alone."""
    lengths = lengths or requested_lengths(config, tokenizer)
    kinds = _kinds(objective)
    if config.streaming and kinds != TRAINING:
        raise ConfigError(
            "data.streaming: alignment reads its data whole (a prompt stays in one split, and the reference is asked "
            "about every example once); leave streaming out, or take a part: data.train.limit"
        )
    if config.streaming:
        return _load_streamed(config, objective, tokenizer, is_encoder_decoder, lengths)
    examples: dict[str, list[Example]] = {}
    notes: list[str] = []
    readings: list[TableReading] = []
    skipped: list[str] | None = [] if config.bad_rows == "skip" else None
    scales: list[float] = []  # of each source: examples for each one that is read
    for k, source in enumerate(config.train):
        tables = _tables_to_read(source, config, is_first=k == 0)
        loaded = load_examples(
            tables, *_reading_options(source), source.limit, config.seed, skipped is not None, progress, sample,
            kinds, config.group,
        )  # fmt: skip
        notes += (*map(str, loaded.readings), *loaded.sample_notes)
        readings += loaded.readings
        scales.append(next((loaded.scales[split] for split in TRAINABLE_SPLITS if split in loaded.scales), 1.0))
        if progress is not None and source.limit is None:
            progress.check_estimate(loaded.memory, loaded.sample_notes)
        if skipped is not None:
            skipped += loaded.skipped
        for split, rows in loaded.splits.items():
            examples.setdefault(split, []).extend(replace(e, source_index=k) if k else e for e in rows)
    warnings = [w for name, rows in examples.items() for w in warn_of_remarks(name or "data", rows)]
    trainable = [e for split in TRAINABLE_SPLITS for e in examples.get(split, ())]
    task = infer_task(trainable, objective, is_encoder_decoder)
    validation, test = _fractions(config)
    splits = split_examples(examples, validation, test, config.seed, stratify=task.name != "regression")
    # of a sample the train split may lack a rare class that another split has
    labeled = splits.train if max(scales) == 1 else (*splits.train, *splits.validation, *splits.test)
    label_names = tuple(config.labels or classification.label_set(labeled)) if task.has_labels else ()
    dropped: list[str] = []
    encode = _in_chunks(build_encoder(task, tokenizer, config, label_names, lengths, skipped, dropped), progress)
    by_source = [encode([e for e in splits.train if e.source_index == k]) for k in range(len(config.train))]
    if not all(by_source):
        empty = [source.path for source, encoded in zip(config.train, by_source, strict=True) if not encoded]
        raise ConfigError(
            f"no training example is left of {', '.join(empty)}: all are in the validation or test split, or duplicates"
            + (f"; {dropped_text(dropped)} (data.max_length={lengths.text.tokens})" if dropped else "")
        )
    ends_of_dropped = [len(dropped)]
    ends = [0, *accumulate(map(len, by_source))]
    train = [item for encoded in by_source for item in encoded]
    num_examples = round(sum(len(encoded) * scale for encoded, scale in zip(by_source, scales, strict=True)))
    encoded_validation = encode(list(splits.validation))
    ends_of_dropped.append(len(dropped))
    encoded_test = encode(list(splits.test))
    ends_of_dropped.append(len(dropped))
    check_few_skipped(skipped or (), len(train) + len(encoded_validation) + len(encoded_test), "the data")
    return Datasets(
        task,
        train,
        encoded_validation,
        encoded_test,
        label_names,
        tuple(range(start, end) for start, end in pairwise(ends)),
        tuple(source.weight * scale for source, scale in zip(config.train, scales, strict=True)),
        splits.majority_accuracy,
        (*notes, str(splits)),
        digest([*train, *encoded_validation, *encoded_test]),
        is_chat=is_chat(splits.train[0]),
        answers=_closed_answers(task, train, [*encoded_validation, *encoded_test], config),
        warnings=tuple(warnings),
        languages=_languages(task, tokenizer, config),
        skipped=tuple(skipped or ()),
        dropped=messages_by_split(dropped, ends_of_dropped),
        test_digest=_content_digest(splits.test),
        reading=readings[0],
        sample=short_example(splits.test or splits.validation or splits.train),
        sampled_of=num_examples if num_examples > len(train) else None,
    )


def _content_digest(examples: Sequence[Example]) -> str:
    keys = "".join(example.exact_key for example in examples)
    return hashlib.sha256(keys.encode()).hexdigest() if keys else ""


def _kinds(requested: str | Task) -> tuple[str, ...]:
    """Of the examples that the task takes; by name alone it is one of plain training."""
    return requested.kinds if isinstance(requested, Task) else TRAINING


def infer_task(examples: Sequence[Example], requested: str | Task, is_encoder_decoder: bool) -> Task:
    """The task of these examples: the requested one, or by what they are where that is "auto"."""
    if examples and isinstance(examples[0], LabeledImage):
        raise ConfigError("data.train.format=image is for models that read images; this one reads text")
    if isinstance(requested, Task):
        return requested
    if requested != "auto":
        return TASKS[requested]
    return next(task for task in TASKS.values() if task.fits(examples, is_encoder_decoder))


def build_encoder(
    task: Task,
    tokenizer: Any,
    config: DataConfig,
    label_names: tuple[str, ...],
    lengths: TextLengths,
    skipped: list[str] | None,
    dropped: list[str] | None = None,
) -> EncodeFn:
    """Examples to items. skipped: gets a message for every example that is refused; None: they are errors.

    dropped: see `EncoderSettings`.
    """
    if task.build_encoder is None:
        raise ConfigError(f"objective={task.name} is for models that read images; this one reads text")
    settings = EncoderSettings(
        tokenizer, lengths.text.tokens, label_names, config.train_on, config.chat_template_kwargs,
        lengths.target.tokens, _languages(task, tokenizer, config),
        [] if dropped is None else dropped,
    )  # fmt: skip
    encode = task.build_encoder(settings)
    return lambda examples: encode_good(encode, examples, skipped)


def _languages(task: Task, tokenizer: Any, config: DataConfig) -> Languages | None:
    return find_languages(tokenizer, config.src_lang, config.tgt_lang) if task.name == "seq2seq_lm" else None


def _in_chunks(encode: EncodeFn, progress: ReadingProgress | None) -> EncodeFn:
    """The same encoder, which reports how far it is."""

    def encode_chunks(examples: Sequence[Example]) -> list[EncodedExample]:
        encoded: list[EncodedExample] = []
        for start in range(0, len(examples), ENCODE_CHUNK):
            if start and progress is not None:
                progress("encoding", start, len(examples))
            encoded += encode(examples[start : start + ENCODE_CHUNK])
        return encoded

    return encode_chunks


def _closed_answers(
    task: Task, train: Sequence[EncodedExample], evaluated: Sequence[EncodedExample], config: DataConfig
) -> ClosedAnswers | None:
    is_answered = task.generates_text and task.kinds == TRAINING
    return find_closed_answers(train, evaluated, config.labels) if is_answered else None


def _held_out(config: DataConfig) -> dict[str, str | float]:
    return {"validation": config.validation, "test": config.test}


def _fractions(config: DataConfig) -> tuple[float, float]:
    """What is taken from train for validation and test: a fraction or a number; 0 where they are files."""
    validation, test = (0.0 if isinstance(value, str) else value for value in _held_out(config).values())
    return validation, test


def _tables_to_read(source: SourceConfig, config: DataConfig, is_first: bool) -> str | Mapping[str, str]:
    """What `load_examples` reads: the source, with the files of validation and test beside the first one."""
    files = {name: resolve_data(value) for name, value in _held_out(config).items() if isinstance(value, str)}
    return {"train": resolve_data(source.path), **files} if files and is_first else resolve_data(source.path)


def _reading_options(source: SourceConfig) -> tuple[str | None, dict[str, str] | None, str | None]:
    return (None if source.format == "auto" else source.format), (source.columns or None), source.system_prompt


def _load_streamed(
    config: DataConfig, objective: str | Task, tokenizer: Any, is_encoder_decoder: bool, lengths: TextLengths
) -> Datasets:
    """Train is read as it is trained on; validation and test come from its front, or from files of their own."""
    if len(config.train) > 1:
        raise ConfigError("data.streaming reads one source; join the files, or leave streaming out")
    (source,) = config.train
    skipped = StreamedMessages() if config.bad_rows == "skip" else None
    tables = _tables_to_read(source, config, True)
    streams = open_stream(tables, *_reading_options(source), config.seed, skipped=skipped, kinds=TRAINING)
    stream = streams.get("train") or streams[""]
    held_out: dict[str, list[Example]] = {}
    for split, value in _held_out(config).items():
        if split in streams:
            held_out[split] = list(streams[split])
        elif isinstance(value, float) and 0 < value < 1:
            raise ConfigError(
                f"data.{split}={value} is a fraction of a stream, whose length is not known: choose a number of "
                "examples"
            )
        else:
            held_out[split] = stream.take_unique(int(value)) if not isinstance(value, str) else []
        stream = stream.excluding(held_out[split])
    first_examples = stream.take_unique(PREVIEW_EXAMPLES)
    if not first_examples:
        raise DataError(f"{source.path}: nothing is left to train on: every example is in validation or test")
    task = infer_task(first_examples, objective, is_encoder_decoder)
    label_names = (config.labels or ()) if task.has_labels else ()
    if task.has_labels and not label_names:
        raise ConfigError("data.streaming: the labels are not known beforehand: write data.labels=[...]")
    encode = build_encoder(task, tokenizer, config, label_names, lengths, skipped)
    validation, test = encode(held_out["validation"]), encode(held_out["test"])
    preview = encode(first_examples)
    notes = [*map(str, stream.readings), f"streamed; counted over the first {len(first_examples):,} examples"]
    return Datasets(
        task,
        StreamedItems(stream, encode),
        validation,
        test,
        label_names,
        reading_notes=tuple(notes),
        digest=digest([*preview, *validation, *test]),
        preview=preview,
        is_chat=is_chat(first_examples[0]),
        answers=_closed_answers(task, preview, [*validation, *test], config),
        warnings=tuple(warn_of_remarks("data", first_examples)),
        languages=_languages(task, tokenizer, config),
        skipped=() if skipped is None else skipped,
        test_digest=_content_digest(held_out["test"]),
        reading=stream.readings[0],
        sample=short_example(held_out["test"] or held_out["validation"] or first_examples),
    )


def load_image_datasets(config: DataConfig, sample: RowSample | None = None) -> Datasets:
    """Images to classes; examples are rows of one set, whose splits share no image. sample: see `load_datasets`."""
    from kitout.data.read import image_folders

    if config.group is not None:
        raise ConfigError(
            f"data.group={config.group} is for rows of text, and images are not read in groups: leave it out"
        )
    if len(config.train) > 1:
        raise ConfigError("images come from one source: a folder of class folders, a table or an .npz")
    (source,) = config.train
    if source.format not in ("auto", "image"):
        raise ConfigError(f"data.train.format={source.format}: this model reads images; choose image or auto")
    for split, value in _held_out(config).items():
        if isinstance(value, str):
            raise ConfigError(
                f"data.{split}={value!r}: for images put the files below {split}/ beside train/, "
                f"or name tables of paths train and {split}"
            )
    path = Path(resolve_data(source.path))
    if (path / "images.npz").is_file():  # a built-in set is a folder with its license beside it
        path = path / "images.npz"
    skipped: list[str] | None = [] if config.bad_rows == "skip" else None
    sample = None if sample is None else RowSample(MAX_IMAGES)
    columns = (source.columns.get("image"), source.columns.get("label"))
    images = image_folders.load_images(path, *columns, config.labels, skipped, sample)
    check_few_skipped(skipped or (), len(images), str(path))
    splits = split_images(images, *_fractions(config), config.seed, source.limit)
    ends = [0, *accumulate(map(len, (splits.train, splits.validation, splits.test)))]
    train, validation, test = (list(range(start, end)) for start, end in pairwise(ends))
    used = images.subset([*splits.train, *splits.validation, *splits.test])
    num_examples = round(len(train) * (sample.scale if sample is not None else 1))
    num_examples = min(num_examples, source.limit or num_examples)
    return Datasets(
        TASKS["image_classification"],
        train,
        validation,
        test,
        images.label_names,
        majority_accuracy=splits.majority_accuracy,
        reading_notes=(*((f"images: {sample.note}",) if sample and sample.note else ()), f"images: {splits}"),
        digest=used.digest,
        images=used,
        skipped=tuple(skipped or ()),
        test_digest=images.subset(splits.test).digest if splits.test else "",
        sampled_of=num_examples if num_examples > len(train) else None,
    )
