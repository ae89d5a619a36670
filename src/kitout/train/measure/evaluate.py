"""What came of a run: base against adapter on the held-out part, with intervals and examples side by side.

Both are asked the same examples in one process, the base by wearing nothing. What `watch` measures during training is
the same in small. It knows sets, kits and metrics, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.base import memory
from kitout.data.encode.item import IGNORED
from kitout.evaluate.compare import Comparison, Shown, beside, compare, select, side_by_side
from kitout.evaluate.metrics.language import Summed
from kitout.evaluate.metrics.measure import Measure, Score
from kitout.kit import Kit
from kitout.train.config.schema import EvaluateConfig
from kitout.train.loop.jobs import Job
from kitout.train.measure.predict import Seen, Tell, scores, see, write
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_of
from kitout.train.setup.datasets import Sets
from kitout.train.setup.prepare import Prepared


def watching(made: Prepared, config: EvaluateConfig) -> Callable[[], dict[str, float]]:
    """Measures every job's validation part: `eval_<metric>`, with several jobs `eval_<job>/<metric>` besides means."""

    def watch() -> dict[str, float]:
        found: dict[str, float] = {}
        for job, held in zip(made.jobs, made.sets, strict=True):
            if not len(job.watched):
                continue
            measured = figures(made, job, held, job.watched, config.generate, config.max_new_tokens)
            alone = len(made.jobs) == 1
            found |= {
                f"eval_{name}" if alone else f"eval_{job.name}/{name}": m.value for name, m in measured[0].items()
            }
        memory.reset_peak(made.kit.device)  # what training takes is counted by itself
        return found if len(made.jobs) == 1 else found | _means(found)

    return watch


def watched_names(made: Prepared, config: EvaluateConfig) -> list[str]:
    """The metrics that every measurement during training will tell, by which a best one may be chosen."""
    found: set[str] = set()
    for job, held in zip(made.jobs, made.sets, strict=True):
        items = list(job.watched)
        if not items:
            continue
        gold = gold_of(held)
        seen = Seen([Summed(0.0, 1, 1)] * len(items), [gold(item) for item in items])
        if held.answers is not None and config.generate:
            seen.likeliest = [item.reference for item in items]
        elif job.objective.task == "generation" and config.generate:
            seen.written = [item.reference for item in items if item.reference][: config.generate]
        names = held.names if held.objective == "tokens" else ()
        found |= scores(job.objective, items, seen, gold, names).keys()
    return sorted(found)


def _means(found: dict[str, float]) -> dict[str, float]:
    """Over the jobs: what the best checkpoint of a joint run is chosen by."""
    names = {key.rpartition("/")[2] for key in found}
    held = {name: [v for key, v in found.items() if key.endswith(f"/{name}")] for name in names}
    return {f"eval_{name}": sum(values) / len(values) for name, values in held.items()}


def figures(
    made: Prepared, job: Job, held: Sets, items: Sequence[Any], generate: int, longest: int | None,
    name: str | None = "", tell: Tell | None = None,
) -> tuple[dict[str, Measure], Seen]:  # fmt: skip
    """Metrics over items and what they come from. name: who is worn; "" the job's adapter, None the base."""
    kit: Kit = made.kit
    with kit.use(job.name if name == "" else name):
        closed = held.answers if generate else None
        seen = see(kit, job.objective, items, tell, closed)
        if closed is None and job.objective.task == "generation" and generate:
            answered = [item for item in items if item.reference][:generate]
            if answered:
                seen.written = write(kit, made.tokenizer, answered, longest, tell)
    names = held.names if held.objective == "tokens" else ()
    return scores(job.objective, items, seen, gold_of(held), names), seen


def gold_of(held: Sets) -> Callable[[Any], Any]:
    """What is true of an example, in the words its metrics take."""
    if held.images is not None:
        return lambda row: held.images.labels[row]
    if held.objective == "tokens":
        return lambda item: [label for label in item.labels if label != IGNORED]
    return lambda item: item.value


@dataclass(frozen=True)
class Outcome:
    """What one job reached on its test part."""

    scores: Mapping[str, Score]
    """Metrics with their intervals, the headline first; without a comparison that one alone."""
    comparison: Comparison | None
    """Beside the base; None where the base's own head answers other labels."""
    predictions: Sequence[int] = ()
    """Of each test example the class it is given; empty where examples have no class."""
    truth: Sequence[int] = ()
    """The class it has."""
    items: Sequence[Any] = ()
    """The test examples."""


def outcomes(
    made: Prepared, config: EvaluateConfig, tell_of: Callable[[str], Tell] | None = None
) -> dict[str, Outcome]:
    """Every job that has a test part on it, beside the base, which is asked once where jobs ask it the same."""
    found: dict[str, Outcome] = {}
    asked: dict[Hashable, tuple[dict[str, Measure], Seen]] = {}
    for job, held in zip(made.jobs, made.sets, strict=True):
        items = list(held.test)[: config.test]
        if not items:
            continue
        tell = None if tell_of is None else tell_of(job.name)
        tuned, said = figures(made, job, held, items, config.test, config.max_new_tokens, "", tell)
        comparison: Comparison | None = None
        if not held.names or len(held.names) == made.kit.config.num_labels:
            question = _question(job, held)
            if question not in asked:
                asked[question] = figures(made, job, held, items, config.test, config.max_new_tokens, None, tell)
            before, heard = asked[question]
            comparison = compare(before, tuned, _shown(made, job, held, items, heard, said, config))
            scores = {change.name: change.tuned for change in comparison.changes}
        else:
            headline = next(iter(tuned))
            scores = {headline: tuned[headline].score()}
        classes: dict[str, Any] = {}
        if job.objective.task == "classification":
            classes = {"predictions": said.predictions, "truth": [gold_of(held)(item) for item in items]}
        found[job.name] = Outcome(scores, comparison, **classes, items=items)
    return found


def _question(job: Job, held: Sets) -> Hashable:
    """Jobs with the same one get the same answers from the base: by data, and by what the model is shown of it."""
    if held.images is not None:
        from kitout.train.objectives.image_classification import Pictures  # images need pillow

        assert isinstance(job.objective, Pictures)
        return id(held), job.objective.pixels.size
    return id(held), job.name


def _shown(
    made: Prepared, job: Job, held: Sets, items: Sequence[Any], base: Seen, tuned: Seen, config: EvaluateConfig
) -> tuple[Shown, ...]:  # fmt: skip
    most = config.shown
    if held.images is not None or not most:
        return ()
    if held.answers is not None:
        return _written(made, job, held.answers, items, base, tuned, config)
    if tuned.written:
        asked = [item for item in items if item.reference][: len(tuned.written)]
        prompts = [_text(made, prompt_of(item)) for item in asked]
        return side_by_side(prompts, [item.reference for item in asked], base.written, tuned.written, most)
    if held.objective in ("causal", "seq2seq", "tokens"):
        return ()
    prompts = [_text(made, item.ids) for item in items]
    said = [[_worded(held, guess) for guess in seen.predictions] for seen in (base, tuned)]
    return side_by_side(prompts, [item.reference for item in items], said[0], said[1], most)


def _written(
    made: Prepared, job: Job, answers: ClosedAnswers, items: Sequence[Any], base: Seen, tuned: Seen,
    config: EvaluateConfig,
) -> tuple[Shown, ...]:  # fmt: skip
    """Of a closed set: examples are chosen by the likeliest answers, and what is written is shown and judged."""
    references = [item.reference for item in items]
    why = select(references, base.likeliest, tuned.likeliest, config.shown)
    shown = [items[i] for i in why]
    with made.kit.use(None):
        before = write(made.kit, made.tokenizer, shown, config.max_new_tokens)
    with made.kit.use(job.name):
        after = write(made.kit, made.tokenizer, shown, config.max_new_tokens)
    prompts = [_text(made, prompt_of(item)) for item in shown]
    true = [item.reference for item in shown]
    return beside(prompts, true, before, after, list(why.values()), answers.names)


def _text(made: Prepared, ids: Sequence[int]) -> str:
    return str(made.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _worded(held: Sets, guess: Any) -> str:
    if isinstance(guess, list):
        return ", ".join(name for name, there in zip(held.names, guess, strict=False) if there)
    return held.names[guess] if held.names and isinstance(guess, int) and guess < len(held.names) else f"{guess:.4g}"
