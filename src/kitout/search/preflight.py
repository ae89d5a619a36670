"""What a search is going to do, before it does it: rungs, examples, time, and what may go wrong.

It knows a plan and its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kitout.format import align_columns, format_duration
from kitout.search.plan.rungs import cost
from kitout.search.population.look import FEW_VALIDATION
from kitout.search.population.population import Population
from kitout.search.ray_tune import engine_text


def preflight_text(population: Population, start: Mapping[str, Any]) -> str:
    """Lines for a terminal. start: what was found at the first look."""
    plan, length, rungs = population.plan, population.length, population.rungs
    default, ends = start["default"], population.ends
    rows: list[tuple[str, ...]] = [("rung", "designs", "steps", "examples of each")]
    for number, (rung, end) in enumerate(zip(rungs, ends, strict=True), 1):
        rows.append((str(number), f"{rung.candidates}", f"to {end:,}", f"{end * length.batch_size:,}"))
    trainings, most = cost(rungs), start["max_examples"]
    extra = most / (length.steps * length.batch_size)
    confirmed = len(plan.confirm.seeds) * (1 + plan.confirm.designs)
    count = f"{plan.space.num_designs():g} designs besides their learning rates"
    over = f", over the budget ({default['over_budget']}): trained for comparison alone"
    own = f"the run's own: {default['trainable']:,} trainable parameters{over if default['over_budget'] else ''}"
    total = f"{trainings:.2f} trainings, at most {extra:.2f} where candidates do not differ"
    lines = [
        f"\n{plan.candidates} candidates: {', '.join(plan.space.method)}; {count}",
        own,
        f"a whole training: {length.steps:,} steps of {length.batch_size} examples, seed {length.seed}",
        *align_columns(rows),
        f"{total}; then up to {confirmed} to confirm",
    ]
    if plan.engine == "ray":
        lines.append(engine_text(plan))
    if start["seconds"]:
        lines.append(
            f"one training of the run's own design takes about {format_duration(start['seconds'])}: the rungs about "
            f"{format_duration(trainings * start['seconds'])}, without measuring, the confirmation at most "
            f"{format_duration(confirmed * start['seconds'])}"
        )
    if start["validation"] < FEW_VALIDATION:
        lines.append(
            f"warning: candidates are compared on {start['validation']} validation examples, which hardly tells two of "
            "them apart: raise run.data.validation"
        )
    return "\n".join(lines)
