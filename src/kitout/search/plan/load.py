"""A checked plan from a file, a mapping or settings: the schema, then what contradicts itself, all errors at once.

It opens no file but the plan that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from kitout.errors import ConfigError, Errors
from kitout.search.plan.rungs import cost, plan_rungs
from kitout.search.plan.schema import SearchPlan
from kitout.train.config import overrides
from kitout.train.config.conflicts import find_conflicts
from kitout.train.config.load import announce_torch, validate
from kitout.train.config.plain_values import check_size
from kitout.train.config.schema import WITHOUT_METHODS
from kitout.train.config.yaml_file import read_yaml

HEADING = "the plan"
SHORTHANDS = {"space": "method", **{f"run.{name}": key for name, key in overrides.SHORTHANDS.items()}}


def read_values(plan: SearchPlan | Mapping[str, Any] | str | PathLike[str]) -> dict[str, Any]:
    """The plain values of a plan, a mapping or a file."""
    if isinstance(plan, SearchPlan):
        return plan.to_dict()
    return dict(plan) if isinstance(plan, Mapping) else read_yaml(Path(plan))


def build_plan(
    file: Path | None, settings: Iterable[overrides.Override | str], log: Callable[[str], None] | None = None
) -> SearchPlan:
    """The plan that a file (None: none) and settings describe; the later wins. ConfigError names every error."""
    values = read_yaml(file) if file is not None else {}
    return overrides.build(values, settings, lambda values: load_plan(values, log), check_plan, SHORTHANDS)


def load_plan(values: Mapping[str, Any], log: Callable[[str], None] | None = None) -> SearchPlan:
    """A checked plan from plain values (YAML, JSON, a form). ConfigError names every error at once.

    log: gets a line before torch is loaded, if it is not yet.
    """
    announce_torch(log)
    return _load(values, None)


def check_plan(values: Mapping[str, Any]) -> None:
    """ConfigError for what can be found out without the methods."""
    _load(values, WITHOUT_METHODS)


def _load(values: Mapping[str, Any], context: object) -> SearchPlan:
    check_size(values, HEADING)
    plan = validate(values, SearchPlan, context, HEADING)
    if context is None:
        errors = Errors(ConfigError, HEADING)
        for message in dict.fromkeys(_contradictions(plan)):
            errors.add(message)
        errors.raise_if_any()
    return plan


def _contradictions(plan: SearchPlan) -> Iterator[str]:
    """Of the run with every method of the space, and of the numbers with each other."""
    for method in (plan.run.method, *(plan.space.build(name, {}) for name in plan.space.method)):
        for conflict in find_conflicts(plan.run.model_copy(update={"method": method})):
            yield f"run.{conflict}"
    rungs = plan_rungs(plan.candidates, plan.halving.factor, plan.halving.first)
    steps, batch = plan.run.train.steps, plan.run.train.batch_size
    if steps is not None and steps < len(rungs):
        yield (
            f"run.train.steps={steps}: halving.factor={plan.halving.factor} from halving.first="
            f"{plan.halving.first:g} has {len(rungs)} rungs, of one step each at least: train longer, or set a larger "
            "halving.first"
        )
    if steps is not None and batch is not None and plan.budget.examples is not None:
        needed = round(cost(rungs) * steps * batch)
        if plan.budget.examples < needed:
            yield examples_text(plan.budget.examples, needed, plan.candidates, cost(rungs), steps, batch)


def examples_text(given: int, needed: int, candidates: int, trainings: float, steps: int, batch: int) -> str:
    """What is wrong with a budget of examples."""
    return (
        f"budget.examples={given:,}: {candidates} candidates are {trainings:.2f} trainings of {steps:,} steps of "
        f"{batch}, {needed:,} examples: raise it, or have fewer candidates or steps (run.train.steps)"
    )
