"""The pre-flight of a prepared run: what `screen` shows of each job before its first step.

It puts facts, counts and estimates together; how they look is `screen`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kitout.data.encode.item import Item
from kitout.data.statistics import Facts, facts, rendered
from kitout.runtime.show import site_rows
from kitout.train.config.schema import RunConfig
from kitout.train.preflight.cost_estimate import Estimate
from kitout.train.preflight.render import Preflight
from kitout.train.setup.datasets import Sets
from kitout.train.setup.prepare import Prepared


def told(made: Prepared) -> list[Facts]:
    """Facts of every job's data, over all of it. DataError where nothing can be learnt."""
    return [
        facts(
            {
                "train": _items(one, one.looked_at or one.train),
                "validation": _items(one, one.validation),
                "test": _items(one, one.test),
            },
            one.names,
            one.answers is not None,
        )
        for one in made.sets
    ]


def pages(made: Prepared, config: RunConfig, known: Sequence[Facts], guess: Estimate) -> list[Preflight]:
    """One page a job; memory and time are of all of them together."""
    found = []
    for number, (job, own) in enumerate(zip(made.jobs, config.alone(), strict=True)):
        one = made.sets[number]
        shown = next((item for item in _items(one, one.looked_at or one.train) if item.learned), None)
        last = number == len(made.jobs) - 1
        found.append(
            Preflight(
                settings=_settings(made, own, number, guess),
                facts=known[number],
                example=rendered(shown, made.tokenizer) if shown is not None and shown.ids else [],
                answer=_answer(one, shown),
                count=made.kit.num_parameters(job.name),
                sites=site_rows(made.kit[job.name].sites),
                steps=len(job.steps),
                memory=guess.memory if last else None,
                time=guess.seconds if last else None,
                warnings=made.notes if last else (),
            )
        )
    return found


def _settings(made: Prepared, own: RunConfig, number: int, guess: Estimate) -> dict[str, str]:
    kit, job, one = made.kit, made.jobs[number], made.sets[number]
    method = kit[job.name].method
    own_lr = method.advised().lr if own.train.lr is None else own.train.lr
    settings = ", ".join(f"{k}={v}" for k, v in method.describe().items())
    several = len(made.jobs) > 1
    forward = f"{guess.micro} of all jobs" if several else f"{min(guess.micro, own.train.batch)}"
    told = {
        "model": f"{own.model.name}, {str(kit.dtype)[6:]} ({made.why}), {kit.device.type}",
        "method": f"{type(method).__name__}({settings})" if settings else type(method).__name__,
        "objective": made.objective,
        "batch": f"{own.train.batch} examples a step, at most {forward} in one forward; learning rate {own_lr:g}",
    }
    told |= _data(one)
    if one.majority and made.objective != "regress":
        told["commonest"] = f"always saying the commonest answer gets {100 * one.majority:.1f} % of the test part right"
    return ({"job": job.name} if several else {}) | told


def _data(one: Sets) -> dict[str, str]:
    """How each source was read, then how all of them were parted."""
    *read, parted = one.told
    named = {f"data {i + 1}" if i else "data": line for i, line in enumerate(read)}
    return named | {"parts" if read else "data": parted}


def _items(one: Sets, items: Sequence[Any]) -> Sequence[Item]:
    if one.images is None:
        return items
    return [Item((), value=int(one.images.labels[row]), place=f"image {row}") for row in items]


def _answer(one: Sets, shown: Item | None) -> str:
    if shown is None or shown.value is None:
        return ""
    if isinstance(shown.value, tuple):
        return ", ".join(name for name, there in zip(one.names, shown.value, strict=False) if there) or "none"
    return one.names[int(shown.value)] if one.names else f"{shown.value:g}"
