"""The designs of the front and the run's own, trained anew with fresh seeds and judged on the untouched test split.

It is one run of `kitout train` with seeds, in a folder of its own, so that it resumes, reports and keeps its scores as
any other. A design is better where its difference to the run's own is significant after Holm's correction. It knows
runs and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kitout.evaluate.example_scores import ExampleScores, load_scores
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.significance.many import compare_pairs
from kitout.evaluate.significance.seeds import MIN_SEEDS, MethodDifference
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import Design
from kitout.search.population.rung import Length, run_config
from kitout.train.config.schema import RunConfig
from kitout.train.config.seeds import adapter_name
from kitout.train.run import run as train_run
from kitout.train.run_folder import SCORES_FILE

NOTHING_BETTER = "No design beats the default"


@dataclass(frozen=True)
class Confirmed:
    """One design on the test split. (The names are keys of search.json.)"""

    name: str
    """The design."""
    mean: float
    """Of the goal's metric over its seeds."""
    by_seed: tuple[float, ...]
    """The same of each seed."""
    low: float | None
    """Lower end of the mean's 95 % interval over the test examples; None where a training gave no finite score."""
    high: float | None
    """Upper end of it."""
    against_default: MethodDifference | None
    """None of the run's own design."""

    @property
    def verdict(self) -> str:
        """In words; "" of the run's own."""
        return "" if self.against_default is None else self.against_default.verdict


@dataclass(frozen=True)
class Confirmation:
    """What the test split says of the designs."""

    metric: str
    """The goal's."""
    share: bool
    """A fraction, printed in percent."""
    higher_is_better: bool
    """Of the metric."""
    designs: tuple[Confirmed, ...]
    """The run's own first."""
    recommended: str
    """A design that keeps the budget and is not significantly worse than the run's own, by name; "" where none is."""
    answer: str
    """What was found, in one sentence."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def confirmation_config(plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path) -> RunConfig:
    """The run that trains these designs once with each seed."""
    config = run_config(plan, length, designs, folder)
    forgetting = "none" if plan.goal.max_forgetting is None else "quick"
    train = config.train.model_copy(update={
        "seed": 0, "seeds": plan.confirm.seeds, "save_steps": plan.run.train.save_steps, "keep_checkpoints": 2,
    })  # fmt: skip
    evaluate = config.evaluate.model_copy(update={"forgetting": forgetting})
    return config.model_copy(update={"train": train, "evaluate": evaluate})


def confirm(
    plan: SearchPlan, length: Length, designs: Sequence[Design], folder: Path, metric: str, log: Callable[[str], None]
) -> tuple[Confirmation, dict[str, Any]]:
    """designs: the run's own first. Also gives what results.json of the run holds. Finished before, it is read."""
    result = train_run(confirmation_config(plan, length, designs, folder), log=log, source="search")
    kept = load_scores(folder / SCORES_FILE)
    scores = {
        one.name: [kept[adapter_name(one.name, seed)].tuned[metric] for seed in plan.confirm.seeds] for one in designs
    }
    return judge(metric, scores, {one.name: one.over_budget for one in designs}), dict(result.figures)


def judge(
    metric: str, scores: Mapping[str, Sequence[ExampleScores]], over_budget: Mapping[str, str] | None = None
) -> Confirmation:
    """The verdicts. scores: by design the scores of its seeds, the run's own first. over_budget: why not, by design."""
    default, first = next(iter(scores)), next(iter(scores.values()))[0]
    means = {name: tuple(one.measure.value for one in own) for name, own in scores.items()}
    usable = {name: own for name, own in scores.items() if all(one.is_finite for one in own)}
    against: dict[str, MethodDifference] = {}
    if default in usable and len(usable) > 1:
        is_mean = first.is_mean and not first.is_linearized
        table = {name: np.stack([one.per_example for one in own]) for name, own in usable.items()}
        pairs = compare_pairs(
            table, default, groups=first.groups, higher_is_better=first.higher_is_better, share=first.share and is_mean
        )
        against = {pair.name: pair for pair in pairs}
    designs = []
    for name in scores:
        low, high = _interval(usable[name]) if name in usable else (None, None)
        designs.append(Confirmed(name, float(np.mean(means[name])), means[name], low, high, against.get(name)))
    recommended, answer = _recommend(designs, default, usable, over_budget or {}, first.higher_is_better)
    return Confirmation(metric, first.share, first.higher_is_better, tuple(designs), recommended, answer)


def _interval(scores: Sequence[ExampleScores]) -> tuple[float, float]:
    """Of the mean over seeds, over the examples."""
    first, values = scores[0], np.mean([one.per_example for one in scores], axis=0)
    of_mean = replace(first, ratio=Ratio(values, np.ones(len(values))), is_correct=False)
    score = of_mean.measure.score()
    return score.low, score.high


def _recommend(
    designs: Sequence[Confirmed], default: str, usable: Mapping[str, Any], over_budget: Mapping[str, str],
    higher_is_better: bool,
) -> tuple[str, str]:  # fmt: skip
    """The name of a design, and the answer."""
    sign = 1 if higher_is_better else -1
    allowed = [one for one in designs if one.name in usable and not over_budget.get(one.name)]
    better = [one for one in allowed if one.against_default is not None and one.against_default.is_better]
    if better:
        best = max(better, key=lambda one: sign * one.mean)
        return best.name, f"{best.name} is {best.verdict}"
    seeds = {len(one.by_seed) for one in designs}
    if min(seeds) < MIN_SEEDS:
        said = f"no verdict: {min(seeds)} seeds, and {MIN_SEEDS} of each design are needed (confirm.seeds)"
    else:
        said = NOTHING_BETTER
    if any(one.name == default for one in allowed):
        return default, said
    reason = over_budget.get(default) or "its training gave no finite score"
    equal = [one for one in allowed if one.against_default is None or one.against_default.is_better is None]
    if equal:
        best = max(equal, key=lambda one: sign * one.mean)
        return best.name, (
            f"{said}, which is no recommendation ({reason}); {best.name} keeps the budget and does not differ "
            "significantly from it"
        )
    return "", (
        f"{said}, and every design within the budget is significantly worse than it ({reason}): raise the budget, or "
        "look at what the rungs decided"
    )
