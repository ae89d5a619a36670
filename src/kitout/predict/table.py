"""Rows in, predictions out: what `kitout predict` does between an input and an output file.

Inputs are predicted in chunks of fixed places, so a run that was stopped computes the same batches as one that was not.
A bad row is left out or an error; nothing is kept but the chunk at hand. It knows no terminal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from kitout.data.examples.formats import nan_to_none
from kitout.data.read.tables import add_first
from kitout.errors import BadRows, DataError, Errors
from kitout.evaluate.compare import format_value
from kitout.evaluate.intervals.resampled import wilson_interval
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import compute_measures, metric_title
from kitout.files.base_fingerprint import fingerprint
from kitout.files.usage_record import UsageRecord
from kitout.predict.answer_inputs import PAIR
from kitout.predict.input_rows import InputRow, InputRows
from kitout.predict.output_file import MAX_LISTED, OutputFile, OutputProgress, to_json
from kitout.predict.prediction import Prediction
from kitout.predict.predictor import Predictor
from kitout.train.objectives.tasks import USES

CHUNK_ROWS = 512  # of classes and numbers: what is lost when a run is killed
CHUNK_BATCHES, DEFAULT_BATCH = 2, 16  # of texts that are written, which takes longer
MAX_SCORED = 20_000  # rows of a metric that is resampled

BadRowsChoice = Literal["error", "skip"]


@dataclass
class TableResult:
    """What came of an input."""

    progress: OutputProgress
    """Counts of rows: predicted, bad, truncated."""
    score: str = ""
    """What the rows themselves say of the predictions, in words; "" where they say nothing."""
    path: Path | None = None
    """The file."""
    notes: list[str] = field(default_factory=list)
    """How the input was read."""


@dataclass(frozen=True)
class TablePredictor:
    """A predictor, and how a table goes through it."""

    predictor: Predictor
    """With one adapter active."""
    batch_size: int | None = None
    """Inputs of one forward at most; None: by their length."""
    bad_rows: BadRowsChoice = "error"
    """Whether a row that cannot be read stops the run."""
    with_probabilities: bool = True
    """Whether the probability of every label is written, not only of the likeliest."""

    @property
    def chunk_rows(self) -> int:
        """Inputs that are predicted together."""
        if USES[self.predictor.usage.task].generates_text and not _closed(self.predictor.usage):
            return CHUNK_BATCHES * (self.batch_size or DEFAULT_BATCH)
        return max(CHUNK_ROWS, self.batch_size or 0)

    def settings(self, adapter: str) -> dict[str, Any]:
        """Everything that decides the content of an output file, besides the input. adapter: its digest."""
        kit = self.predictor.kit
        return {
            "adapter": adapter,
            "base": hashlib.sha256(fingerprint(kit.state, ()).model_dump_json().encode()).hexdigest(),
            "task": self.predictor.usage.task,
            "batch_size": self.batch_size,
            "probabilities": self.with_probabilities,
            "device": kit.device.type,
            "dtype": str(kit.dtype).removeprefix("torch."),
        }

    def to_file(
        self, rows: InputRows, output: OutputFile, settings: dict[str, Any],
        on_progress: Callable[[int], None] | None = None,
    ) -> TableResult:  # fmt: skip
        """Predicts every input into a file, going on where an earlier run of the same stopped."""
        try:
            progress = output.begin(settings)
            inputs = self._after(progress, rows)
            while chunk := list(islice(inputs, self.chunk_rows)):
                done = progress.num_inputs

                def tell(number: int, done: int = done) -> None:
                    if on_progress is not None:
                        on_progress(done + number)

                tell(0)
                output.append(self._predict_rows(rows, chunk, progress, tell), progress)
            result = TableResult(progress, notes=rows.notes)
            if rows.has_references:
                scorer = Scorer(rows, progress.names)
                for row in output.rows():
                    scorer.add(row, row)
                result.score = scorer.text()
            result.path = output.finish(_arrow_types(rows.path))
            return result
        finally:
            output.close()

    def stream(self, rows: InputRows, chunk_rows: int | None = None) -> Iterator[tuple[dict[str, Any], OutputProgress]]:
        """Every output row, with the counts so far; nothing is written. chunk_rows: inputs predicted together."""
        progress, inputs = OutputProgress({}), iter(rows)
        while chunk := list(islice(inputs, chunk_rows or self.chunk_rows)):
            for row in self._predict_rows(rows, chunk, progress):
                progress.num_written += 1
                yield row, progress

    def _after(self, progress: OutputProgress, rows: InputRows) -> Iterator[InputRow]:
        """The inputs that are not done. DataError where those that are done were others."""
        inputs, seen = iter(rows), OutputProgress({})
        for row in islice(inputs, progress.num_inputs):
            seen.digest = seen.digest_with(_content(row))
            seen.num_inputs += 1
        if seen.num_inputs < progress.num_inputs or seen.digest != progress.digest:
            raise DataError(
                f"{rows.name} is not what these predictions were begun with: name another --out, or --overwrite"
            )
        return inputs

    def _predict_rows(
        self, source: InputRows, chunk: Sequence[InputRow], progress: OutputProgress,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The output rows of a chunk, in order; bad ones are counted, or an error."""
        problems = {i: row.problem for i, row in enumerate(chunk) if row.problem}
        predictions: dict[int, Prediction] = {}
        good = [i for i in range(len(chunk)) if i not in problems]
        report = None if on_progress is None else (lambda done, _total: on_progress(done))
        while good:
            try:
                found = self.predictor([chunk[i].value for i in good], batch_size=self.batch_size, on_progress=report)
                predictions = dict(zip(good, found, strict=True))
                break
            except BadRows as error:
                if not error.messages:
                    raise
                for k, message in error.messages.items():
                    problems[good[k]] = source.name_columns(_without_number(message))
                good = [i for i in good if i not in problems]
        if not progress.names and predictions:
            progress.names = self._output_names(chunk, predictions)
        rows: list[dict[str, Any]] = []
        taken = set(progress.names.values())
        for i, row in enumerate(chunk):
            if i in predictions and not taken.isdisjoint(row.columns):
                name = next(name for name in row.columns if name in taken)
                problems[i] = f"it has the column {name!r}, which the first rows do not have: add it there"
            elif i in predictions:
                columns = {name: nan_to_none(value) for name, value in row.columns.items()}
                values = self._values(predictions[i])
                rows.append(columns | {progress.names.get(name, name): value for name, value in values.items()})
                progress.num_truncated += predictions[i].num_truncated > 0
        messages = [": ".join(filter(None, (chunk[i].place, problems[i]))) for i in sorted(problems)]
        if messages and self.bad_rows == "error":
            errors = Errors(BadRows, "rows that cannot be predicted (--bad-rows skip leaves them out)")
            add_first(errors, messages, "rows")
            errors.raise_if_any()
        progress.num_bad += len(messages)
        progress.bad += messages[: max(0, MAX_LISTED - len(progress.bad))]
        for row in chunk:
            progress.digest = progress.digest_with(_content(row))
        progress.num_inputs += len(chunk)
        return rows

    def _values(self, prediction: Prediction) -> dict[str, Any]:
        values = prediction.to_dict()
        if not self.with_probabilities:
            values.pop("probabilities", None)
        return values

    def _output_names(self, chunk: Sequence[InputRow], predictions: Mapping[int, Prediction]) -> dict[str, str]:
        """The columns of predicted values: a name that the user has is never overwritten."""
        present = {str(name) for row in chunk for name in row.columns}
        predicted = dict.fromkeys(name for p in predictions.values() for name in self._values(p))
        names: dict[str, str] = {}
        for name in dict.fromkeys([*predicted, "num_truncated"]):
            candidates = (name, f"predicted_{name}", *(f"predicted_{name}_{k}" for k in range(2, len(present) + 3)))
            names[name] = next(each for each in candidates if each not in present)
            present.add(names[name])
        return names


class Scorer:
    """What the rows' own labels say of the predictions. names: a predicted value -> its column."""

    def __init__(self, rows: InputRows, names: Mapping[str, str]) -> None:
        self.rows, self.names, self.usage = rows, names, rows.usage
        self.task = "classification" if _closed(self.usage) else USES[self.usage.task].metric_task
        self.num_rows = self.num_correct = self.num_unknown = self.num_unreadable = 0
        self.pairs: list[tuple[Any, Any]] = []

    def add(self, columns: Mapping[str, Any], predicted: Mapping[str, Any]) -> None:
        """columns: the user's own, perhaps beside the predicted ones."""
        try:
            reference = self.rows.reference(columns)
        except DataError:
            self.num_unreadable += 1
            return
        if reference is None:
            return
        if self.task == "classification":
            self.num_rows += 1
            self.num_correct += predicted[self.names["label"]] == reference
            self.num_unknown += reference not in (self.usage.labels or _closed(self.usage))
            return
        pair = self._pair(reference, predicted)
        if pair is not None and len(self.pairs) < MAX_SCORED:
            self.pairs.append(pair)

    def text(self) -> str:
        """In words; "" where no row has said anything."""
        score = self._score()
        if not self.num_unreadable:
            return score
        return f"{score or 'no score'}; {self.num_unreadable:,} rows have a right answer that cannot be read"

    def _score(self) -> str:
        if self.task == "classification":
            if not self.num_rows:
                return ""
            value, interval = self.num_correct / self.num_rows, wilson_interval(self.num_correct, self.num_rows)
            unknown = f"; {self.num_unknown:,} have a label that the adapter does not know" if self.num_unknown else ""
            return _score_text("accuracy", Score(value, *interval, self.num_rows)) + unknown
        if not self.pairs:
            return ""
        predictions, references = zip(*self.pairs, strict=True)
        measures = compute_measures(self.task, list(predictions), list(references))
        name = next(iter(measures))
        return _score_text(metric_title(name, measures[name].note), measures[name].score())

    def _pair(self, reference: Any, predicted: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """A prediction and its reference, as the metric takes them."""
        if self.task == "pairs":
            return tuple(predicted[self.names[f"{side}_score"]] for side in PAIR), reference
        if self.task == "multilabel":
            found, labels = predicted[self.names["labels"]], self.usage.labels
            return [float(label in found) for label in labels], [float(label in reference) for label in labels]
        if self.task == "tokens":
            tags = predicted[self.names["tags"]]
            both = [(tag, true) for tag, true in zip(tags, reference, strict=False) if tag is not None]
            return ([tag for tag, _ in both], [true for _, true in both]) if both else None
        return predicted[self.names["value" if self.task == "regression" else "text"]], reference


def folder_digest(folder: Path) -> str:
    """Of an adapter: its name with a fingerprint of what decides its predictions."""
    sha256 = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin")):
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(2**20), b""):
                sha256.update(block)
    return f"{folder.name} {sha256.hexdigest()[:16]}"


def _closed(usage: UsageRecord) -> list[str]:
    """The closed set of answers of a language model."""
    return [] if usage.text is None else usage.text.answers


def _content(row: InputRow) -> str:
    """What of an input decides its prediction and its output row. An image file: by path, size and time."""
    value = row.value
    if isinstance(value, bytes):
        value = hashlib.sha256(value).hexdigest()
    elif isinstance(value, Path):
        try:
            found = value.stat()
            value = [str(value), found.st_size, found.st_mtime_ns]
        except OSError:
            value = [str(value)]
    return to_json({"place": row.place, "columns": row.columns, "value": value, "problem": row.problem})


def _without_number(message: str) -> str:
    """The place of the row stands before it: "input 3: 'text' is empty" -> "'text' is empty"."""
    start, colon, rest = message.partition(": ")
    return rest if colon and start.startswith("input ") else message


def _score_text(title: str, score: Score) -> str:
    low, high = (format_value(end, score.share) for end in (score.low, score.high))
    percent = " %" if score.share else ""
    value = format_value(score.value, score.share)
    return f"{title} {value}{percent} (95 % interval {low} to {high}) on {score.n:,} rows"


def _arrow_types(path: Path | None) -> dict[str, Any]:
    """Of the columns of a parquet file, so that dates come out as dates."""
    if path is None or path.suffix.lower() != ".parquet":
        return {}
    import pyarrow.parquet

    return {one.name: one.type for one in pyarrow.parquet.read_schema(path)}
