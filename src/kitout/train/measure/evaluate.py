"""Evaluation of a run: base against adapter on the test split, with confidence intervals and examples side by side.

Both answer the same examples in one process; the base answers with no adapter active. Where it has no trained head for
the labels, it is not asked: a constant answer takes its place (`baseline`). During training the same metrics
are taken on the validation split. It knows datasets, kits and metrics, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kitout.base import memory
from kitout.data.encode.item import AnyItem, EncodedExample
from kitout.errors import ConfigError
from kitout.evaluate.compare import BASE, ComparedExample, Comparison, beside, compare, pick_examples, select
from kitout.evaluate.metrics.confusion import Confusion, confusion_matrix
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure, Score
from kitout.evaluate.metrics.per_class import ClassScore, class_scores
from kitout.evaluate.sets.evaluation_set import grouped
from kitout.train.config.schema import EvaluateConfig
from kitout.train.config.seeds import job_of
from kitout.train.loop.jobs import Job
from kitout.train.measure.baseline import BASELINES, predict_constant
from kitout.train.measure.linear_probe import predict_by_probe
from kitout.train.measure.predict import Predictions, ProgressFn, compute_metrics, generate_answers, predict
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_ids
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.prepare import PreparedRun


def validation_fn(run: PreparedRun, config: EvaluateConfig) -> Callable[[], dict[str, float]]:
    """Evaluates every job's validation split: `eval_<metric>`; with several jobs `eval_<job>/<metric>` and means."""

    def evaluate_validation() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for job in run.jobs:
            if not len(job.validation):
                continue
            measures, _ = evaluate(
                run, job, job.validation, job.name,
                num_generated=config.generate_examples, max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
            prefix = "eval_" if len(run.jobs) == 1 else f"eval_{job.name}/"
            metrics |= {f"{prefix}{name}": measure.value for name, measure in measures.items()}
        memory.reset_peak(run.kit.device)  # the peak that is logged is the training steps' own
        return metrics if len(run.jobs) == 1 else metrics | mean_over_jobs(metrics)

    return evaluate_validation


def metric_names(run: PreparedRun, config: EvaluateConfig) -> list[str]:
    """The metrics that every evaluation during training will report, by which the best checkpoint may be chosen."""
    return sorted(perfect_measures(run, config))


def perfect_measures(run: PreparedRun, config: EvaluateConfig) -> dict[str, Measure]:
    """The same as they would be if every answer were right, the headline of the first job first."""
    measures: dict[str, Measure] = {}
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        examples = list(job.validation)
        if not examples:
            continue
        reference = dataset.reference_of
        perfect = Predictions([LossSums(0.0, 1, 1)] * len(examples), [reference(example) for example in examples])
        if dataset.answers is not None and config.generate_examples:
            perfect.likeliest_answers = [example.reference for example in examples]
        elif job.objective.task == "generation" and config.generate_examples:
            references = [example.reference for example in examples if example.reference]
            perfect.texts = references[: config.generate_examples]
        of_job = compute_metrics(job.objective.task, examples, perfect, reference, _label_names(dataset))
        measures |= {name: one for name, one in of_job.items() if name not in measures}
    return measures


def mean_over_jobs(metrics: dict[str, float]) -> dict[str, float]:
    """`eval_<metric>`, over the jobs' `eval_<job>/<metric>`: the best checkpoint of a joint run is chosen by these."""
    names = {key.rpartition("/")[2] for key in metrics}
    by_job = {name: [v for key, v in metrics.items() if key.endswith(f"/{name}")] for name in names}
    return {f"eval_{name}": sum(values) / len(values) for name, values in by_job.items()}


def evaluate(
    run: PreparedRun, job: Job, examples: Sequence[Any], adapter: str | None, *, num_generated: int,
    max_new_tokens: int | None, on_progress: ProgressFn | None = None,
) -> tuple[dict[str, Measure], Predictions]:  # fmt: skip
    """The job's metrics over these examples, and the predictions behind them. adapter: the active one; None: the base.

    num_generated: for how many of them an answer is generated (any number but 0: the closed set is scored over all).
    """
    kit = run.kit
    dataset = next(dataset for other, dataset in zip(run.jobs, run.datasets, strict=True) if other is job)
    with kit.use(adapter):
        closed = dataset.answers if num_generated else None
        predictions = predict(kit, job.objective, examples, on_progress, closed)
        if closed is None and job.objective.task == "generation" and num_generated:
            answered = [example for example in examples if example.reference][:num_generated]
            if answered:
                predictions.texts = generate_answers(kit, run.tokenizer, answered, max_new_tokens, on_progress)
    references = dataset.reference_of
    return compute_metrics(job.objective.task, examples, predictions, references, _label_names(dataset)), predictions


def _label_names(dataset: Datasets) -> Sequence[str]:
    """For the metrics that read names (spans of tags); elsewhere a class is its number."""
    return dataset.label_names if dataset.objective == "token_classification" else ()


@dataclass(frozen=True)
class JobOutcome:
    """What one job reached on its test split."""

    scores: Mapping[str, Score]
    """Metrics with their intervals, the headline first."""
    comparison: Comparison
    """With the base, or with a constant answer where the base has no trained head for these labels."""
    predictions: Sequence[int] = ()
    """The predicted class of each test example; empty where examples have no class."""
    references: Sequence[int] = ()
    """The true class of each test example."""
    items: Sequence[Any] = ()
    """The test examples."""
    per_class: Sequence[ClassScore] = ()
    """Of every classification, closed answers of a language model included: its classes one by one."""
    confusion: Confusion | None = None
    """Of the same, where each example (or tagged word) has one class."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """The adapter's metrics, which can be compared with those of another over the same examples."""
    base_measures: Mapping[str, Measure] = field(default_factory=dict)
    """Those of what it is compared with, over the same examples."""


def evaluate_jobs(
    run: PreparedRun, config: EvaluateConfig, progress_fn_of: Callable[[str], ProgressFn] | None = None
) -> dict[str, JobOutcome]:
    """Every job with a test split, against the base, which is run once for jobs that give it the same inputs."""
    outcomes: dict[str, JobOutcome] = {}
    base_results: dict[Hashable, tuple[dict[str, Measure], Predictions]] = {}
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        examples = list(dataset.test)[: config.max_test_examples]
        if not examples:
            continue
        how: dict[str, Any] = {
            "num_generated": config.max_test_examples,
            "max_new_tokens": config.max_new_tokens,
            "on_progress": None if progress_fn_of is None else progress_fn_of(job.name),
        }
        measures, predictions = evaluate(run, job, examples, job.name, **how)
        task, baseline, probe = job.objective.task, BASE, None
        if task != "generation" and (run.new_heads or _has_other_labels(run, dataset)):
            base_predictions, baseline = predict_constant(task, dataset, examples), BASELINES[task]
            references_of = dataset.reference_of
            base_measures = compute_metrics(task, examples, base_predictions, references_of, _label_names(dataset))
            probed = predict_by_probe(run, job, dataset, examples) if task == "classification" else None
            if probed is not None:
                probe = in_groups(compute_metrics(job.objective.task, examples, probed, references_of), examples)
        else:
            key = _base_inputs_key(run, job, dataset)
            if key not in base_results:
                base_results[key] = evaluate(run, job, examples, None, **how)
            base_measures, base_predictions = base_results[key]
        measures, base_measures = (in_groups(each, examples) for each in (measures, base_measures))
        shown = _compared_examples(run, job, dataset, examples, base_predictions, predictions, config)
        comparison = compare(base_measures, measures, shown, baseline=baseline, probe=probe)
        scores = {change.name: change.tuned for change in comparison.changes}
        classes: dict[str, Any] = {}
        if job.objective.task == "classification":
            references = [dataset.reference_of(example) for example in examples]
            classes = {"predictions": predictions.predictions, "references": references}
        per_class, confusion = _by_class(task, dataset, examples, predictions)
        outcomes[job.name] = JobOutcome(
            scores, comparison, **classes, items=examples, per_class=per_class, confusion=confusion, measures=measures,
            base_measures=base_measures,
        )  # fmt: skip
    return outcomes


def check_groups(run: PreparedRun, config: EvaluateConfig) -> None:
    """Before training: ConfigError where the examples that are tested at the end are of one group (`data.group`)."""
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        groups = groups_of(list(dataset.test)[: config.max_test_examples])
        if groups and len(set(groups)) < 2:
            raise ConfigError(
                f"{job.name}: the {len(groups)} test examples are of one group ({groups[0]!r}), which gives no "
                "interval: at least two groups are needed, so ask for more (data.test, evaluate.max_test_examples)"
            )


def groups_of(examples: Sequence[Any]) -> list[str]:
    """Of each example; empty where the data are not in groups."""
    groups = [one.group for one in examples if isinstance(one, AnyItem)]
    return groups if any(groups) else []


def in_groups(measures: Mapping[str, Measure], examples: Sequence[Any]) -> dict[str, Measure]:
    """The measures with their examples in the groups of the data, if they have any."""
    groups = groups_of(examples)
    answered = [one.group for one in examples if isinstance(one, EncodedExample) and one.reference] if groups else ()
    return grouped(measures, groups, answered)


def _by_class(
    task: str, dataset: Datasets, examples: Sequence[Any], predictions: Predictions
) -> tuple[list[ClassScore], Confusion | None]:  # fmt: skip
    """Scores class by class and the confusion matrix, of whatever has classes."""
    if predictions.likeliest_answers and dataset.answers is not None:
        references = [example.reference for example in examples]
        counted = ("classification", predictions.likeliest_answers, references, dataset.answers.names)
    elif dataset.label_names:
        references = [dataset.reference_of(example) for example in examples]
        counted = (task, predictions.predictions, references, dataset.label_names)
    else:
        return [], None
    return class_scores(*counted, groups_of(examples)), confusion_matrix(*counted)


def _has_other_labels(run: PreparedRun, dataset: Datasets) -> bool:
    """Whether the base's own head is of another number of labels than this job's."""
    return bool(dataset.label_names) and len(dataset.label_names) != run.kit.config.num_labels


def _base_inputs_key(run: PreparedRun, job: Job, dataset: Datasets) -> Hashable:
    """Jobs with the same key get the same answers from the base: same data, and images of the same size."""
    if dataset.images is not None:
        from kitout.train.objectives.image_classification import ImageClassification  # images need pillow

        assert isinstance(job.objective, ImageClassification)
        return id(dataset), job.objective.pixels.size
    return id(dataset), job_of(run.seeds, job.name)


def _compared_examples(
    run: PreparedRun, job: Job, dataset: Datasets, examples: Sequence[Any], base: Predictions, tuned: Predictions,
    config: EvaluateConfig,
) -> tuple[ComparedExample, ...]:  # fmt: skip
    max_shown = config.show_examples
    if dataset.images is not None or not max_shown:
        return ()
    if dataset.answers is not None:
        return _compared_closed_answers(run, job, dataset.answers, examples, base, tuned, config)
    if tuned.texts:
        answered = [example for example in examples if example.reference][: len(tuned.texts)]
        prompts = [_decode(run, prompt_ids(example)) for example in answered]
        return pick_examples(prompts, [example.reference for example in answered], base.texts, tuned.texts, max_shown)
    if dataset.objective in ("causal_lm", "seq2seq_lm", "token_classification"):
        return ()
    prompts = [_decode(run, example.input_ids) for example in examples]
    base_texts, tuned_texts = (
        [_prediction_text(dataset, prediction) for prediction in result.predictions] for result in (base, tuned)
    )
    return pick_examples(prompts, [example.reference for example in examples], base_texts, tuned_texts, max_shown)


def _compared_closed_answers(
    run: PreparedRun, job: Job, answers: ClosedAnswers, examples: Sequence[Any], base: Predictions, tuned: Predictions,
    config: EvaluateConfig,
) -> tuple[ComparedExample, ...]:  # fmt: skip
    """Of a closed set: examples are picked by their likeliest answers; what is shown and judged is generated."""
    references = [example.reference for example in examples]
    reasons = select(references, base.likeliest_answers, tuned.likeliest_answers, config.show_examples)
    shown = [examples[i] for i in reasons]
    with run.kit.use(None):
        base_texts = generate_answers(run.kit, run.tokenizer, shown, config.max_new_tokens)
    with run.kit.use(job.name):
        tuned_texts = generate_answers(run.kit, run.tokenizer, shown, config.max_new_tokens)
    prompts = [_decode(run, prompt_ids(example)) for example in shown]
    shown_references = [example.reference for example in shown]
    return beside(prompts, shown_references, base_texts, tuned_texts, list(reasons.values()), answers.names)


def _decode(run: PreparedRun, ids: Sequence[int]) -> str:
    return str(run.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _prediction_text(dataset: Datasets, prediction: Any) -> str:
    names = dataset.label_names
    if isinstance(prediction, list):
        return ", ".join(name for name, is_set in zip(names, prediction, strict=False) if is_set)
    if names and isinstance(prediction, int) and prediction < len(names):
        return names[prediction]
    return f"{prediction:.4g}"
