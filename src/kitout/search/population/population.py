"""All that is known of a search's candidates so far, and what follows from it: who stays, who is on the front.

It knows designs, costs and what rungs have measured; it trains and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kitout.search.plan.rungs import Rung, rung_steps
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import Design
from kitout.search.population.generation import Generation
from kitout.search.population.look import Look
from kitout.search.population.rung import Length, RungResult
from kitout.search.population.survivors import Decision, Standing, decide, pareto_fronts, rank


@dataclass
class Population:
    """The candidates of one search."""

    plan: SearchPlan
    """What is searched."""
    length: Length
    """Of a whole training."""
    rungs: Sequence[Rung]
    """As they are planned."""
    max_examples: int
    """That all candidates together may be trained on."""
    look: Look | None = None
    """At the run, where designs are still to be proposed."""
    designs: dict[str, Design] = field(default_factory=dict)
    """By name."""
    latency: dict[str, float] = field(default_factory=dict)
    """By name: a forward's time over the frozen model's."""
    rises: dict[str, float] = field(default_factory=dict)
    """By name: how much the bits per byte of `wiki` rose, where it was measured last."""
    failed: dict[str, str] = field(default_factory=dict)
    """By name of a candidate that could not be trained: the message."""
    checkpoints: dict[str, Path] = field(default_factory=dict)
    """By name: where it stopped."""
    generations: list[Generation] = field(default_factory=list)
    """As they were proposed."""
    results: list[list[RungResult]] = field(default_factory=list)
    """By rung those of its runs: two of the first rung with two generations."""
    decisions: list[list[Decision]] = field(default_factory=list)
    """By rung, the best candidate first."""

    @property
    def ends(self) -> list[int]:
        """The step at which each rung ends."""
        return rung_steps(self.rungs, self.length.steps)

    @property
    def alive(self) -> list[Design]:
        """Those that go on, in the order in which they were proposed."""
        if not self.decisions:
            return list(self.designs.values())
        names = {one.name for one in self.decisions[-1] if one.stays}
        return [one for name, one in self.designs.items() if name in names]

    @property
    def metric(self) -> str:
        """The goal's."""
        return self.results[0][0].metric

    @property
    def higher_is_better(self) -> bool:
        """Of the goal's metric."""
        return next(one.higher_is_better for done in self.results[0] for one in done.scores.values())

    def add(self, result: RungResult, folder: Path) -> None:
        """Takes over what a run has come to."""
        self.rises |= result.rises
        self.failed |= result.failed
        self.checkpoints |= dict.fromkeys(result.names, folder / result.checkpoint)

    def standings(self, results: Sequence[RungResult]) -> list[Standing]:
        """Every candidate as these runs have measured it."""
        return [
            Standing(name, result.scores[name], result.losses[name], self._costs(name))
            for result in results
            for name in result.names
        ]

    def decide(self, results: Sequence[RungResult], forgetting: Callable[[str], float] | None) -> list[Decision]:
        """Who stays after the rung that comes next. forgetting: of a candidate; None: it is not limited here."""
        number = len(self.results)
        is_last = number + 1 == len(self.rungs)
        diverged = {name: text for result in results for name, text in result.diverged.items()}
        standings = self.standings(results)
        return decide(
            standings, self.rungs[number if is_last else number + 1].candidates, diverged=diverged,
            num_extra=len(standings) if is_last else self._num_extra(results), forgetting=forgetting,
            max_forgetting=self.plan.goal.max_forgetting,
        )  # fmt: skip

    def finish_rung(self, results: Sequence[RungResult]) -> list[Decision]:
        """The same with what was measured of their forgetting, kept."""
        has_rises = self.plan.goal.max_forgetting is not None and any(result.rises for result in results)
        decisions = self.decide(results, self.rises.__getitem__ if has_rises else None)
        self.results.append(list(results))
        self.decisions.append(decisions)
        return decisions

    def shown(self, results: Sequence[RungResult]) -> list[tuple[Mapping[str, object], Sequence[float]]]:
        """What the next proposals know: params and values of each that did not diverge."""
        gone = {name for result in results for name in result.diverged}
        return [
            (self.designs[one.name].params, (one.merit, *one.costs))
            for one in self.standings(results)
            if one.name not in gone
        ]

    def front(self, but: str) -> list[Design]:
        """Designs that stayed to the end and that no other beats in the metric and in trainable parameters at once.

        Best first. but: the name of one that is left out.
        """
        stayed = {one.name for one in self.decisions[-1] if one.stays}
        standings = [one for one in self.standings(self.results[-1]) if one.name in stayed]
        points = {one.name: (-one.merit, float(self.designs[one.name].trainable)) for one in standings}
        fronts = dict(zip(points, pareto_fronts(list(points.values())), strict=True))
        of_point: dict[tuple[float, float], str] = {}  # of designs that are equal in both the one of the lower loss
        for one in rank(standings):
            if fronts[one.name] == 0:
                of_point.setdefault(points[one.name], one.name)
        names = [name for point, name in sorted(of_point.items()) if name != but]
        return [self.designs[name] for name in names]

    def with_limits(self, design: Design) -> Design:
        """Marked where its forward takes longer than the budget allows; what else it costs was counted before."""
        most, found = self.plan.budget.max_latency, self.latency.get(design.name)
        if most is None or found is None or found <= most or design.over_budget:
            return design
        return replace(design, over_budget=f"{found:.2f} x the frozen model's forward of {most:g}")

    def cost(self) -> dict[str, float]:
        """What the rungs took so far, in whole trainings of one design and in seconds."""
        done = [result for results in self.results for result in results]
        return {
            "trainings": self.num_examples() / (self.length.steps * self.length.batch_size),
            "examples": self.num_examples(),
            "seconds": sum(one.seconds for one in done),
            "training_seconds": sum(one.training_seconds for one in done),
            "memory": max(one.memory for one in done),
        }

    def num_examples(self) -> int:
        """Trained on so far, of all candidates together."""
        return sum(result.examples for done in self.results for result in done)

    def _num_extra(self, results: Sequence[RungResult]) -> int:
        """How many more than planned the budget holds in the next rung, after all rungs that are planned."""
        number, batch, ends = len(self.results), self.length.batch_size, self.ends
        steps_of = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        planned = sum(
            rung.candidates * steps * batch
            for rung, steps in list(zip(self.rungs, steps_of, strict=True))[number + 1 :]
        )
        spent = self.num_examples() + sum(result.examples for result in results)
        return max(0, (self.max_examples - spent - planned) // (steps_of[number + 1] * batch))

    def _costs(self, name: str) -> tuple[float, ...]:
        """What the metric is traded against."""
        costs = {
            "trainable_parameters": float(self.designs[name].trainable),
            "latency": self.latency.get(name, 1.0),
            "forgetting": self.rises.get(name, 0.0),
        }
        return tuple(costs[one] for one in self.plan.goal.against)
