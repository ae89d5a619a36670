"""What came of a run: base against adapter on the held-out part, with intervals and examples side by side.

Both are asked the same examples in one process, the base by wearing nothing. What `watch` measures during training is
the same in small. It knows sets, kits and metrics, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.base import memory
from kitout.data.encode.item import IGNORE_INDEX
from kitout.evaluate.compare import ComparedExample, Comparison, beside, compare, pick_examples, select
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure, Score
from kitout.kit import Kit
from kitout.train.config.schema import EvaluateConfig
from kitout.train.loop.jobs import Job
from kitout.train.measure.predict import Predictions, ProgressFn, compute_metrics, generate_answers, predict
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_ids
from kitout.train.setup.datasets import Datasets
from kitout.train.setup.prepare import PreparedRun


def validation_fn(run: PreparedRun, config: EvaluateConfig) -> Callable[[], dict[str, float]]:
    """Measures every job's validation part: `eval_<metric>`, with several jobs `eval_<job>/<metric>` besides means."""

    def watch() -> dict[str, float]:
        found: dict[str, float] = {}
        for job, held in zip(run.jobs, run.datasets, strict=True):
            if not len(job.validation):
                continue
            measured = evaluate_examples(
                run, job, held, job.validation, config.generate_examples, config.max_new_tokens
            )
            alone = len(run.jobs) == 1
            found |= {
                f"eval_{name}" if alone else f"eval_{job.name}/{name}": m.value for name, m in measured[0].items()
            }
        memory.reset_peak(run.kit.device)  # what training takes is counted by itself
        return found if len(run.jobs) == 1 else found | _mean_over_jobs(found)

    return watch


def metric_names(run: PreparedRun, config: EvaluateConfig) -> list[str]:
    """The metrics that every measurement during training will tell, by which a best one may be chosen."""
    found: set[str] = set()
    for job, held in zip(run.jobs, run.datasets, strict=True):
        items = list(job.validation)
        if not items:
            continue
        gold = reference_of(held)
        seen = Predictions([LossSums(0.0, 1, 1)] * len(items), [gold(item) for item in items])
        if held.answers is not None and config.generate_examples:
            seen.likeliest_answers = [item.reference for item in items]
        elif job.objective.task == "generation" and config.generate_examples:
            seen.texts = [item.reference for item in items if item.reference][: config.generate_examples]
        names = held.label_names if held.objective == "token_classification" else ()
        found |= compute_metrics(job.objective, items, seen, gold, names).keys()
    return sorted(found)


def _mean_over_jobs(metrics: dict[str, float]) -> dict[str, float]:
    """Over the jobs: what the best checkpoint of a joint run is chosen by."""
    names = {key.rpartition("/")[2] for key in metrics}
    held = {name: [v for key, v in metrics.items() if key.endswith(f"/{name}")] for name in names}
    return {f"eval_{name}": sum(values) / len(values) for name, values in held.items()}


def evaluate_examples(
    run: PreparedRun, job: Job, dataset: Datasets, items: Sequence[Any], num_generated: int, max_new_tokens: int | None,
    adapter: str | None = "", on_progress: ProgressFn | None = None,
) -> tuple[dict[str, Measure], Predictions]:  # fmt: skip
    """Metrics over items and what they come from. name: who is worn; "" the job's adapter, None the base."""
    kit: Kit = run.kit
    with kit.use(job.name if adapter == "" else adapter):
        closed = dataset.answers if num_generated else None
        seen = predict(kit, job.objective, items, on_progress, closed)
        if closed is None and job.objective.task == "generation" and num_generated:
            answered = [item for item in items if item.reference][:num_generated]
            if answered:
                seen.texts = generate_answers(kit, run.tokenizer, answered, max_new_tokens, on_progress)
    names = dataset.label_names if dataset.objective == "token_classification" else ()
    return compute_metrics(job.objective, items, seen, reference_of(dataset), names), seen


def reference_of(dataset: Datasets) -> Callable[[Any], Any]:
    """What is true of an example, in the words its metrics take."""
    if dataset.images is not None:
        return lambda row: dataset.images.labels[row]
    if dataset.objective == "token_classification":
        return lambda item: [label for label in item.labels if label != IGNORE_INDEX]
    return lambda item: item.label


@dataclass(frozen=True)
class JobOutcome:
    """What one job reached on its test part."""

    scores: Mapping[str, Score]
    """Metrics with their intervals, the headline first; without a comparison that one alone."""
    comparison: Comparison | None
    """Beside the base; None where the base's own head answers other labels."""
    predictions: Sequence[int] = ()
    """Of each test example the class it is given; empty where examples have no class."""
    references: Sequence[int] = ()
    """The class it has."""
    items: Sequence[Any] = ()
    """The test examples."""


def evaluate_jobs(
    run: PreparedRun, config: EvaluateConfig, tell_of: Callable[[str], ProgressFn] | None = None
) -> dict[str, JobOutcome]:
    """Every job that has a test part on it, beside the base, which is asked once where jobs ask it the same."""
    found: dict[str, JobOutcome] = {}
    asked: dict[Hashable, tuple[dict[str, Measure], Predictions]] = {}
    for job, held in zip(run.jobs, run.datasets, strict=True):
        items = list(held.test)[: config.max_test_examples]
        if not items:
            continue
        tell = None if tell_of is None else tell_of(job.name)
        tuned, said = evaluate_examples(
            run, job, held, items, config.max_test_examples, config.max_new_tokens, "", tell
        )
        comparison: Comparison | None = None
        if not held.label_names or len(held.label_names) == run.kit.config.num_labels:
            question = _base_question(job, held)
            if question not in asked:
                asked[question] = evaluate_examples(
                    run, job, held, items, config.max_test_examples, config.max_new_tokens, None, tell
                )
            before, heard = asked[question]
            comparison = compare(before, tuned, _compared_examples(run, job, held, items, heard, said, config))
            scores = {change.name: change.tuned for change in comparison.changes}
        else:
            headline = next(iter(tuned))
            scores = {headline: tuned[headline].score()}
        classes: dict[str, Any] = {}
        if job.objective.task == "classification":
            classes = {"predictions": said.predictions, "references": [reference_of(held)(item) for item in items]}
        found[job.name] = JobOutcome(scores, comparison, **classes, items=items)
    return found


def _base_question(job: Job, dataset: Datasets) -> Hashable:
    """Jobs with the same one get the same answers from the base: by data, and by what the model is shown of it."""
    if dataset.images is not None:
        from kitout.train.objectives.image_classification import ImageClassification  # images need pillow

        assert isinstance(job.objective, ImageClassification)
        return id(dataset), job.objective.pixels.size
    return id(dataset), job.name


def _compared_examples(
    run: PreparedRun,
    job: Job,
    dataset: Datasets,
    items: Sequence[Any],
    base: Predictions,
    tuned: Predictions,
    config: EvaluateConfig,
) -> tuple[ComparedExample, ...]:
    most = config.show_examples
    if dataset.images is not None or not most:
        return ()
    if dataset.answers is not None:
        return _compared_closed_answers(run, job, dataset.answers, items, base, tuned, config)
    if tuned.texts:
        asked = [item for item in items if item.reference][: len(tuned.texts)]
        prompts = [_decode(run, prompt_ids(item)) for item in asked]
        return pick_examples(prompts, [item.reference for item in asked], base.texts, tuned.texts, most)
    if dataset.objective in ("causal_lm", "seq2seq_lm", "token_classification"):
        return ()
    prompts = [_decode(run, item.input_ids) for item in items]
    said = [[_prediction_text(dataset, guess) for guess in seen.predictions] for seen in (base, tuned)]
    return pick_examples(prompts, [item.reference for item in items], said[0], said[1], most)


def _compared_closed_answers(
    run: PreparedRun,
    job: Job,
    answers: ClosedAnswers,
    items: Sequence[Any],
    base_result: Predictions,
    adapter_result: Predictions,
    config: EvaluateConfig,
) -> tuple[ComparedExample, ...]:
    """Of a closed set: examples are chosen by the likeliest answers, and what is written is shown and judged."""
    references = [item.reference for item in items]
    why = select(references, base_result.likeliest_answers, adapter_result.likeliest_answers, config.show_examples)
    shown = [items[i] for i in why]
    with run.kit.use(None):
        before = generate_answers(run.kit, run.tokenizer, shown, config.max_new_tokens)
    with run.kit.use(job.name):
        after = generate_answers(run.kit, run.tokenizer, shown, config.max_new_tokens)
    prompts = [_decode(run, prompt_ids(item)) for item in shown]
    true = [item.reference for item in shown]
    return beside(prompts, true, before, after, list(why.values()), answers.names)


def _decode(run: PreparedRun, ids: Sequence[int]) -> str:
    return str(run.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _prediction_text(dataset: Datasets, prediction: Any) -> str:
    if isinstance(prediction, list):
        return ", ".join(name for name, there in zip(dataset.label_names, prediction, strict=False) if there)
    return (
        dataset.label_names[prediction]
        if dataset.label_names and isinstance(prediction, int) and prediction < len(dataset.label_names)
        else f"{prediction:.4g}"
    )
