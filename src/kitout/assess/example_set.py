"""A source of rows as a set to measure on: questions with choices, plain texts, or examples of a task.

Examples are read as `kitout train` reads its test split, by the adapters' own record of how they were trained. It knows
no adapter and no report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kitout.data.encode import classification
from kitout.data.encode.item import EncodedExample, digest
from kitout.data.examples.examples import Example
from kitout.data.read.sources import Table, detect_from_head, load_examples, open_source
from kitout.errors import DataError
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.ask.choices import read_choices
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.sets.choice_set import ChoiceSet
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet, digest_of, sample
from kitout.evaluate.sets.text_set import TextSet
from kitout.files.usage_record import TextRecord, UsageRecord
from kitout.route import RouteEntry
from kitout.train.config.schema import DataConfig, SourceConfig
from kitout.train.measure.baseline import BASELINES, predict_constant
from kitout.train.measure.predict import Predictions, compute_metrics, generate_answers_under, predict
from kitout.train.objectives.tasks import TASKS, ObjectiveSettings
from kitout.train.setup.closed_answers import ClosedAnswers, find_closed_answers
from kitout.train.setup.datasets import build_encoder, infer_objective
from kitout.train.setup.find_inputs import resolve_data
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.lengths import requested_lengths

SPLIT_ORDER = ("test", "validation", "", "train")  # which of a source's splits is measured on: the first there is
CHOICE_ROLES = ("question", "choices", "answer")
LANGUAGE_TASKS = ("causal_lm", "seq2seq_lm")

T = TypeVar("T")


@dataclass(frozen=True)
class ExampleSet:
    """Examples of a task of `kitout train`, texts of any objective."""

    name: str
    """As the source names it."""
    dataset: Datasets
    """Encoded; all of them are its test split."""

    @property
    def kind(self) -> str:
        return self.dataset.objective

    @property
    def digest(self) -> str:
        closed = self.dataset.answers
        return digest_of(
            [self.kind, self.dataset.digest, self.dataset.label_names, None if closed is None else closed.names]
        )

    def __len__(self) -> int:
        return len(self.dataset.test)

    def ask(self, asked: Asked, routes: Sequence[RouteEntry], on_progress: ProgressFn | None) -> list[Any]:
        objective = TASKS[self.kind].build_objective(asked.kit, ObjectiveSettings(asked.pad_token_id))
        items, closed = self.dataset.test, self.dataset.answers
        found = []
        for route in routes:
            with asked.kit.use(route):
                found.append(predict(asked.kit, objective, items, on_progress, closed))
        if closed is None and TASKS[self.kind].generates_text:
            answered = [item for item in items if item.reference]
            texts = generate_answers_under(
                asked.kit, asked.tokenizer, answered, routes, asked.max_new_tokens, on_progress
            )
            for predictions, of_route in zip(found, texts, strict=True):
                predictions.texts = of_route
        return [asdict(predictions) for predictions in found]

    def constant(self) -> tuple[str, Any] | None:
        task = TASKS[self.kind].metric_task
        if not self.dataset.label_names:
            return None
        return BASELINES[task], asdict(predict_constant(task, self.dataset, self.dataset.test))

    def measures(self, answers: Any) -> dict[str, Measure]:
        losses = [LossSums(**sums) for sums in answers["losses"]]
        predictions = Predictions(losses, answers["predictions"], answers["texts"], answers["likeliest_answers"])
        task, dataset = TASKS[self.kind], self.dataset
        names = dataset.label_names if self.kind == "token_classification" else ()
        return compute_metrics(task.metric_task, dataset.test, predictions, dataset.reference_of, names)


def read_set(
    source: SourceConfig, tokenizer: Any, is_encoder_decoder: bool, usage: UsageRecord | None, seed: int = 0
) -> EvaluationSet:
    """A source as what its columns say: question, choices and answer; plain texts; or examples of the adapters' task.

    usage: how the adapters were trained: task, labels, preprocessing. source.limit: so many, sampled by the seed.
    DataError where the source cannot be read.
    """
    path, kind = resolve_data(source.path), source.format
    found = open_source(path)
    splits = {table.split for table in found}
    split = next(name for name in SPLIT_ORDER if name in splits)
    tables = [table for table in found if table.split == split]
    if kind == "auto":
        columns = {source.columns.get(role, role) for role in CHOICE_ROLES}
        head = next(iter(tables[0].iter_rows()), None)
        if head is not None and columns <= set(head[1]):
            kind = "choice"
        elif (usage is None or usage.task in LANGUAGE_TASKS) and _is_plain_text(tables[0], source):
            kind = "text"
    if kind == "choice":
        rows = [values for table in tables for _, values in table.read_rows()]
        rows = [row | {role: row.get(column) for role, column in source.columns.items()} for row in rows]
        return ChoiceSet(source.path, tuple(sample(read_choices(rows, source.path), source.limit, seed)))
    record = None if usage is None else usage.text
    system_prompt = source.system_prompt or (None if record is None else record.system_prompt)
    own_format = None if kind == "auto" else kind
    loaded = load_examples(path, own_format, source.columns or None, None if kind == "text" else system_prompt)
    examples = sample(loaded.splits[split], source.limit, seed)
    if kind == "text":
        return TextSet(source.path, tuple(text for example in examples if (text := example.source_text())))
    return ExampleSet(source.path, _encode(examples, tokenizer, is_encoder_decoder, usage))


def _is_plain_text(table: Table, source: SourceConfig) -> bool:
    return detect_from_head(table, columns=source.columns or None).format.name == "text"


def _encode(
    examples: Sequence[Example], tokenizer: Any, is_encoder_decoder: bool, usage: UsageRecord | None
) -> Datasets:
    """Examples as the adapters' training encoded them."""
    record = None if usage is None else usage.text
    data = DataConfig(train=({"path": "evaluated"},))  # type: ignore[arg-type]  # a source by its plain values
    if record is not None:
        data = data.model_copy(
            update={
                "max_length": record.max_length,
                "chat_template_kwargs": record.chat_template_kwargs,
                "src_lang": record.src_lang,
                "tgt_lang": record.tgt_lang,
            }
        )
    task = TASKS[infer_objective(examples, "auto" if usage is None else usage.task, is_encoder_decoder)]
    labels: Sequence[str] = ()
    if task.has_labels:
        labels = usage.labels if usage is not None else classification.label_set(examples)
    encode = build_encoder(task, tokenizer, data, tuple(labels), requested_lengths(data, tokenizer), None)
    items = encode(examples)
    if not items:
        raise DataError("there is nothing to measure on")
    return Datasets(
        task.name, items, [], items, tuple(labels), digest=digest(items),
        answers=_closed_answers(items, record) if task.generates_text else None,
    )  # fmt: skip


def _closed_answers(items: Sequence[EncodedExample], record: TextRecord | None) -> ClosedAnswers | None:
    """The closed set that the adapters were trained on, if all answers here are in it; else that of these examples."""
    known = () if record is None or record.end_token is None else tuple(record.answers)
    if record is not None and record.end_token is not None and all(item.reference in known for item in items):
        return ClosedAnswers(known, tuple(map(tuple, record.answer_tokens)), record.end_token)
    return find_closed_answers(items, ())
