"""Examples of a task of `kitout train` as a set to measure on, encoded as the adapters' training encoded them.

Texts and images alike: all of them are the test split of a dataset, asked and scored by what evaluates a run. It knows
no source and no report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kitout.data.encode import classification
from kitout.data.encode.item import EncodedExample, digest
from kitout.data.examples.examples import Example
from kitout.errors import ConfigError, DataError
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.sets.evaluation_set import Asked, digest_of, grouped
from kitout.files.usage_record import TextRecord, UsageRecord
from kitout.kit import Kit
from kitout.route import RouteEntry
from kitout.train.config.schema import DataConfig
from kitout.train.measure.baseline import BASELINES, predict_constant
from kitout.train.measure.predict import Predictions, compute_metrics, generate_answers_under, predict
from kitout.train.objectives.tasks import TASKS, ObjectiveSettings
from kitout.train.setup.closed_answers import ClosedAnswers, find_closed_answers
from kitout.train.setup.datasets import build_encoder, infer_task
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.lengths import requested_lengths


@dataclass(frozen=True)
class ExampleSet:
    """Examples of a task of `kitout train`."""

    name: str
    """As the source names it."""
    dataset: Datasets
    """Encoded; all of them are its test split, and its train split too."""
    groups: tuple[str, ...] = ()
    """Of each example, where several are about one thing; empty: every one stands for itself."""
    pixels: Any = None
    """The PixelProcessor of images."""

    @property
    def kind(self) -> str:
        return self.dataset.objective

    @property
    def digest(self) -> str:
        closed = self.dataset.answers
        pixels = None if self.pixels is None else [self.pixels.size, self.pixels.processor.to_dict()]
        answers = None if closed is None else asdict(closed)
        return digest_of([self.kind, self.dataset.digest, self.dataset.label_names, answers, pixels])

    @property
    def shares_batches(self) -> bool:
        return self.dataset.answers is None and TASKS[self.kind].generates_text

    def __len__(self) -> int:
        return len(self.dataset.test)

    def ask(self, asked: Asked, routes: Sequence[RouteEntry], on_progress: ProgressFn | None) -> list[Any]:
        settings = ObjectiveSettings(asked.pad_token_id, images=self.dataset.images, pixels=self.pixels)
        objective = TASKS[self.kind].build_objective(asked.kit, settings)
        items, closed = self.dataset.test, self.dataset.answers
        found = []
        for route in routes:
            with asked.kit.use(route):
                found.append(predict(asked.kit, objective, items, on_progress, closed))
        if closed is None and TASKS[self.kind].generates_text:
            answered = [item for item in items if item.reference]
            texts = generate_answers_under(
                asked.kit, asked.tokenizer, answered, routes, asked.max_new_tokens, on_progress
            ) if answered else [[] for _ in routes]  # fmt: skip
            for predictions, of_route in zip(found, texts, strict=True):
                predictions.texts = of_route
        return [asdict(predictions) for predictions in found]

    def constant(self) -> tuple[str, Any] | None:
        task = TASKS[self.kind].metric_task
        if task not in BASELINES or self.dataset.answers is not None:
            return None
        return BASELINES[task], asdict(predict_constant(task, self.dataset, self.dataset.test))

    def measures(self, answers: Any) -> dict[str, Measure]:
        losses = [LossSums(**sums) for sums in answers["losses"]]
        predictions = Predictions(losses, answers["predictions"], answers["texts"], answers["likeliest_answers"])
        task, dataset = TASKS[self.kind], self.dataset
        names = dataset.label_names if self.kind == "token_classification" else ()
        measures = compute_metrics(task.metric_task, dataset.test, predictions, dataset.reference_of, names)
        if not self.groups:
            return measures
        answered = [group for group, item in zip(self.groups, dataset.test, strict=True) if item.reference]
        return grouped(measures, self.groups, answered)


def encode_examples(
    examples: Sequence[Example], kit: Kit, tokenizer: Any, usage: UsageRecord | None, writes_text: bool
) -> Datasets:
    """Examples as the adapters' training encoded them; all are the test split."""
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
    is_encoder_decoder = bool(getattr(kit.config, "is_encoder_decoder", False))
    task = infer_task(examples, "auto" if usage is None else usage.task, is_encoder_decoder)
    if task.generates_text != writes_text:
        found, has = ("texts to write", "labels") if task.generates_text else ("labels", "text")
        hint = "" if task.generates_text else "; with a system_prompt a labeled text becomes a chat that it answers"
        raise ConfigError(f"the rows have {found} ({task.name}), and the model answers with {has}{hint}")
    labels: tuple[str, ...] = ()
    if task.has_labels:
        labels = tuple(str(name) for name in (kit.config.id2label.values() if usage is None else usage.labels))
        labels = labels or tuple(classification.label_set(examples))
    items = build_encoder(task, tokenizer, data, labels, requested_lengths(data, tokenizer), None)(examples)
    if not items:
        raise DataError("there is nothing to measure on")
    return Datasets(
        task, items, [], items, labels, digest=digest(items),
        answers=_closed_answers(items, record) if task.generates_text else None,
    )  # fmt: skip


def _closed_answers(items: Sequence[EncodedExample], record: TextRecord | None) -> ClosedAnswers | None:
    """The closed set that the adapters were trained on, if all answers here are in it; else that of these examples."""
    known = () if record is None or record.end_token is None else tuple(record.answers)
    if record is not None and record.end_token is not None and all(item.reference in known for item in items):
        return ClosedAnswers(known, tuple(map(tuple, record.answer_tokens)), record.end_token)
    return find_closed_answers(items, ())
