"""A source of rows as a set to measure on: questions with choices, plain texts, images, or examples of a task.

Of a source with splits only the one that is measured is read; columns are those of the source, else those that the
adapters were trained on. What the model cannot be asked is refused here, before anything is measured. It asks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kitout.assess.example_set import ExampleSet, encode_examples
from kitout.data.examples.examples import Example
from kitout.data.examples.row_groups import detect_grouped
from kitout.data.read.sources import Table, open_source
from kitout.errors import ConfigError, DataError, Errors, suggest
from kitout.evaluate.ask.choices import read_choices
from kitout.evaluate.sets.choice_set import ChoiceSet
from kitout.evaluate.sets.evaluation_set import EvaluationSet, sample
from kitout.evaluate.sets.text_set import TextSet
from kitout.files.usage_record import UsageRecord
from kitout.kit import Kit
from kitout.train.config.schema import SourceConfig
from kitout.train.objectives.tasks import TASKS
from kitout.train.setup.find_inputs import resolve_data
from kitout.train.setup.job_datasets import Datasets

SPLIT_ORDER = ("test", "validation", "", "train")  # which of a source's splits is measured on: the first there is
TEXT_SETTINGS = (  # of a TextRecord
    "columns", "format", "system_prompt", "chat_template_kwargs", "max_length", "src_lang", "tgt_lang", "answers",
)  # fmt: skip
OF_A_SOURCE = {"columns", "format", "system_prompt"}  # of these, what a source says itself, which then holds for all
CHOICE_ROLES = ("question", "choices", "answer")


@dataclass(frozen=True)
class SetReader:
    """Reads sources for one model."""

    kit: Kit
    """The base with its adapters."""
    tokenizer: Any
    """The model's own; None: it reads images."""
    usage: UsageRecord | None
    """How the adapters were trained: task, labels, preprocessing."""
    writes_text: bool
    """Whether it is a language model: else it gives labels or numbers."""
    usages: Mapping[str, UsageRecord] = field(default_factory=dict)
    """Of every adapter that says how it was trained: examples have to reach all of them alike."""
    pixels: Any = None
    """The PixelProcessor of a model that reads images."""
    seed: int = 0
    """Of samples."""

    def read(self, source: SourceConfig, group: str | None = None) -> EvaluationSet:
        """One source. group: the column whose values say which rows are about one thing.

        source.limit: so many examples, sampled by the seed. ConfigError or DataError where it cannot be measured on.
        """
        if self.pixels is not None:
            return self._read_images(source, group)
        tables = _tables_of_split(open_source(resolve_data(source.path)))
        rows = [(table, table.read_rows()) for table in tables]
        first = rows[0][1][0][1]
        values = [cells for _, of_table in rows for _, cells in of_table]
        places = [f"{table.source} line {line}" for table, of_table in rows for line, _ in of_table]
        groups = _groups(values, group, places)
        has_choices = {source.columns.get(role, role) for role in CHOICE_ROLES} <= set(first)
        trained = () if self.usage is None or self.usage.text is None else self.usage.text.columns.values()
        is_trained = bool(trained) and set(trained) <= set(first)  # then its columns mean what they meant in training
        if source.format == "choice" or (
            source.format == "auto" and has_choices and (self.writes_text or not is_trained)
        ):
            return self._read_choices(source, values, groups, places)
        examples, formats = self._read_examples(source, rows, group, self.usage)
        examples, kept_groups = _sampled(examples, groups, source.limit, self.seed)
        if formats == {"text"} and self.writes_text:
            if self.kit.config.is_encoder_decoder:
                raise ConfigError("plain texts have no likelihood under an encoder-decoder: give inputs and answers")
            return TextSet(source.path, tuple(example.source_text() for example in examples), groups=kept_groups)
        dataset = encode_examples(examples, self.kit, self.tokenizer, self.usage, self.writes_text)
        self._check_alike(dataset, lambda usage: encode_examples(
            _sampled(self._read_examples(source, rows, group, usage)[0], groups, source.limit, self.seed)[0],
            self.kit, self.tokenizer, usage, self.writes_text,
        ))  # fmt: skip
        # a chat may be several items, so these say their group themselves
        return ExampleSet(source.path, dataset, tuple(item.group for item in dataset.test) if groups else ())

    def _read_examples(
        self, source: SourceConfig, rows: Sequence[tuple[Table, Any]], group: str | None, usage: UsageRecord | None
    ) -> tuple[list[Example], set[str]]:
        """As the training of an adapter would read them; and the formats."""
        first = rows[0][1][0][1]
        record = None if usage is None else usage.text
        columns, format_name = source.columns, None if source.format == "auto" else source.format
        if record is not None and not columns and set(record.columns.values()) <= set(first):
            columns, format_name = record.columns, format_name or record.format
        system_prompt = source.system_prompt or (None if record is None else record.system_prompt)
        examples: list[Example] = []
        formats: set[str] = set()
        for table, of_table in rows:
            reading = detect_grouped(
                of_table, table.source, group, format=format_name, columns=columns or None, note=table.note,
                kinds=("training",),
            )  # fmt: skip
            if reading.format.name != "text":
                reading = replace(reading, system_prompt=system_prompt)
            formats.add(reading.format.name)
            examples += reading.to_examples(of_table)
        return examples, formats

    def _check_alike(self, dataset: Datasets, encode: Callable[[UsageRecord], Datasets]) -> None:
        """ConfigError where the examples would reach another adapter otherwise than the first one."""
        errors, tried = Errors(ConfigError, "several adapters"), [self.usage]
        for name, usage in self.usages.items():
            if usage in tried:
                continue
            tried.append(usage)
            own = encode(usage)
            if own.digest != dataset.digest or _answers_of(own) != _answers_of(dataset):
                errors.add(f"{name!r} was trained with {_other_settings(self.usage, usage)}")
        errors.raise_if_any()

    def _read_choices(
        self, source: SourceConfig, rows: Sequence[Mapping[str, Any]], groups: tuple[str, ...], places: Sequence[str]
    ) -> ChoiceSet:
        errors = Errors(ConfigError, "columns")
        for role, column in source.columns.items():
            if role not in CHOICE_ROLES:
                errors.add(f"{role!r} is no column of questions with choices; {suggest(role, CHOICE_ROLES)}")
            elif column not in rows[0]:
                errors.add(f"there is no column {column!r} (for {role!r}); {suggest(column, map(str, rows[0]))}")
        if not self.writes_text:
            errors.add("choices are scored by a language model, and this model answers with labels")
        errors.raise_if_any()
        named = [dict(row) | {role: row.get(column) for role, column in source.columns.items()} for row in rows]
        named = [row | {"choices": _as_list(row.get("choices"))} for row in named]
        questions = read_choices(named, "its rows", places)
        sampled, groups = _sampled(questions, groups, source.limit, self.seed)
        return ChoiceSet(source.path, tuple(sampled), groups=groups)

    def _read_images(self, source: SourceConfig, group: str | None) -> ExampleSet:
        from kitout.data.read.image_folders import load_images  # images need pillow

        if group is not None:
            raise ConfigError(f"images are not read in groups: leave out group={group!r}")
        if source.format not in ("auto", "image"):
            raise ConfigError(f"format={source.format}: this model reads images")
        others = [name for name, own in self.usages.items() if self.usage is None or own.images != self.usage.images]
        if others:
            raise ConfigError(f"{', '.join(others)}: trained with another size or image processor: assess them apart")
        path = Path(resolve_data(source.path))
        if (path / "images.npz").is_file():  # a built-in set is a folder with its license beside it
            path = path / "images.npz"
        labels = list(self.usage.labels) if self.usage is not None else list(self.kit.config.id2label.values())
        columns = (source.columns.get("image"), source.columns.get("label"))
        images = load_images(path, *columns, labels or None, to_train=False)
        split = next(name for name in SPLIT_ORDER if name in images.splits)
        rows = [i for i, of_image in enumerate(images.splits) if of_image == split]
        measured = images.subset(sample(rows, source.limit, self.seed))
        indices = list(range(len(measured)))
        dataset = Datasets(
            TASKS["image_classification"],
            indices,
            [],
            indices,
            measured.label_names,
            digest=measured.digest,
            images=measured,
        )
        return ExampleSet(source.path, dataset, pixels=self.pixels)


def _answers_of(dataset: Datasets) -> set[str]:
    """The closed set, in no order: splits of the same data have them by frequency."""
    return set() if dataset.answers is None else set(dataset.answers.names)


def _other_settings(first: UsageRecord | None, other: UsageRecord) -> str:
    """What makes the same row another example, and what to do. A Stack or Mix of both cannot be assessed apart."""
    of_first, of_other = (
        {} if one is None or one.text is None else one.text.model_dump(include=set(TEXT_SETTINGS))
        for one in (first, other)
    )
    names = [name for name in TEXT_SETTINGS if of_first.get(name) != of_other.get(name)]
    listed = ", ".join(names)
    settled = f", or write {listed} of the source for all" if names and {*names} <= OF_A_SOURCE else ""
    return f"other settings than the first adapter{f' ({listed})' if names else ''}: assess it apart{settled}"


def _tables_of_split(tables: Sequence[Table]) -> list[Table]:
    """Of the split that is measured on."""
    splits = {table.split for table in tables}
    split = next(name for name in SPLIT_ORDER if name in splits)
    return [replace(table, split=split) for table in tables if table.split == split]


def _groups(rows: Sequence[Mapping[str, Any]], group: str | None, places: Sequence[str]) -> tuple[str, ...]:
    """The group of every row; empty where none are asked for."""
    if group is None:
        return ()
    missing = next((number for number, row in enumerate(rows) if row.get(group) is None), None)
    if missing is not None:
        raise DataError(f"{places[missing]} has no group: {group!r}; {suggest(group, map(str, rows[missing]))}")
    groups = tuple(str(row[group]) for row in rows)
    if len(set(groups)) < 2:
        raise DataError(f"all rows have the group {groups[0]!r} ({group}): at least two groups are needed")
    return groups


def _sampled(
    items: Sequence[Any], groups: tuple[str, ...], limit: int | None, seed: int
) -> tuple[list[Any], tuple[str, ...]]:
    chosen = sample(range(len(items)), limit, seed)
    kept = tuple(groups[i] for i in chosen) if groups else ()
    if kept and len(set(kept)) < 2:
        raise DataError(f"the {len(kept)} sampled rows are of one group: choose a larger limit")
    return [items[i] for i in chosen], kept


def _as_list(choices: Any) -> Any:
    """A cell of a csv holds a list as JSON."""
    if isinstance(choices, str) and choices.lstrip().startswith("["):
        try:
            return json.loads(choices)
        except ValueError:
            return choices
    return choices
