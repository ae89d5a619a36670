"""A search as it might have been, without a model: designs, rungs and a confirmation of made-up scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

import kitout
from kitout.evaluate.example_scores import ExampleScores
from kitout.evaluate.metrics.measure import proportion
from kitout.search.confirmation import Confirmation, judge
from kitout.search.plan.load import load_plan
from kitout.search.plan.rungs import plan_rungs
from kitout.search.population.design import Design
from kitout.search.population.generation import Generation
from kitout.search.population.population import Population
from kitout.search.population.rung import Length, RungResult
from search.plan.plans import PLAN

METHODS = [kitout.LoRA(rank=r, targets=t) for r in (2, 8) for t in ("attn.q attn.v", "all-linear")]
METHODS += [kitout.IA3(), kitout.Houlsby(width=8), kitout.PrefixTuning(length=4), kitout.LoRA(rank=16)]
ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"]
LENGTH = Length(64, 8, "float32", None, 3)
DEPTH, FIRST_BUDGET = 6, 6000


def scores(accuracy: float, seed: int, n: int) -> ExampleScores:
    """Examples of different difficulty, the same for all."""
    difficulty = np.random.default_rng(0).random(n)
    right = np.random.default_rng(seed).normal(accuracy, 0.1, n) > difficulty
    found = ExampleScores.of(proportion(right))
    assert found is not None
    return found


def population(num_rungs: int = 3, **sections: Any) -> Population:
    """After so many of three rungs; 8 designs, one diverges, one is too slow, one is refused."""
    values = {**copy.deepcopy(PLAN), "candidates": 8, "halving": {"factor": 2, "first": 0.25}, **sections}
    plan = load_plan(values)
    found = Population(plan, LENGTH, plan_rungs(8, 2, 0.25), FIRST_BUDGET)
    designs = [
        Design("default" if i == 0 else f"{type(method).__name__.lower()}-{i:02d}", method, 1e-3 * (i + 1),
               "the run's own" if i == 0 else "proposed", {}, 1000 * 2**i, 4000 * 2**i)
        for i, method in enumerate(METHODS)
    ]  # fmt: skip
    roles = {one.name: ROLES[: 2 + i] for i, one in enumerate(designs)}
    places = {name: [["model.layers", k, r] for k in range(DEPTH) for r in own] for name, own in roles.items()}
    energies = [["model.layers", k, r, 10.0 ** (-k - i / 3)] for k in range(DEPTH) for i, r in enumerate(ROLES)]
    refused = ({"method": {"name": "LoRA", "rank": 64}, "lr": 1e-3, "origin": "proposed", "reason": "9 of 8"},)
    found.generations.append(Generation(tuple(designs), refused, places, energies))
    found.designs = {one.name: one for one in designs}
    found.latency = {one.name: 1.0 + 0.03 * i for i, one in enumerate(designs)}
    names = [one.name for one in designs if found.latency[one.name] <= 1.2]
    for rung in range(num_rungs):
        own = names if rung == 0 else [one.name for one in found.alive]
        diverged = {names[-1]: "'x', step 3: the grad norm is nan"} if rung == 0 else {}
        values_of = {name: scores(0.5 + 0.05 * names.index(name) + 0.05 * rung, names.index(name), 300) for name in own}
        rises = {name: 0.03 - 0.01 * k for k, name in enumerate(own)} if rung else {}
        result = RungResult(
            found.ends[rung], tuple(own), "accuracy", diverged, 12.5, 9.0, 1000, 3 << 20, "checkpoint", {}, values_of,
            dict.fromkeys(own, 1.0), rises,
        )  # fmt: skip
        found.add(result, Path("rungs") / str(rung))
        found.finish_rung([result])
    return found


def confirmation(found: Population) -> Confirmation:
    """Of the run's own design and the front."""
    finalists = ["default", *(one.name for one in found.front(but="default")[:2])]
    values = {
        name: [scores(0.6 + 0.1 * i, 10 * i + seed, 500) for seed in (0, 1, 2)] for i, name in enumerate(finalists)
    }
    return judge("accuracy", values)
