"""One design: a method with its settings and a learning rate, under a name; what it costs and what it is made of.

Costs are counted from the method's closed form at the sites of a surveyed model, before anything is built. Two designs
with the same `identity` train the same adapter. It knows methods and sites, and no data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kitout.base.survey import Survey
from kitout.errors import KitoutError
from kitout.method import Method
from kitout.search.plan.schema import BudgetConfig
from kitout.train.config.method_field import method_to_dict, parse_method

SELECTIONS = ("targets", "layers")
VALUE_BYTES = 4  # adapters are float32


@dataclass(frozen=True)
class Design:
    """What one candidate is. (The names are keys of proposals.json.)"""

    name: str
    """Of its adapter."""
    method: Method
    """What is trained."""
    lr: float
    """Learning rate of AdamW."""
    origin: str
    """Why it is tried: "the run's own", "ranks by gradient", "proposed", ..."""
    params: Mapping[str, Any]
    """The same as values of the space; empty where it lies outside."""
    trainable: int = 0
    """Trainable parameters, heads included."""
    bytes: int = 0
    """Of its file."""
    over_budget: str = ""
    """Why it may be no recommendation, though it is trained: of the run's own design alone."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {"name": self.name, "method": method_to_dict(self.method), "lr": self.lr, "origin": self.origin}
        costs = {"trainable": self.trainable, "bytes": self.bytes, "over_budget": self.over_budget}
        return {**own, "params": dict(self.params), **costs}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Design:
        """What `to_dict` gave."""
        return cls(**{**values, "method": parse_method(values["method"])})

    @property
    def text(self) -> str:
        """LoRA(rank=4, layers=last:8), lr 0.0013"""
        return f"{method_text(self.method)}, lr {self.lr:g}"


def method_text(method: Method) -> str:
    """LoRA(rank=4, layers=last:8); ranks by path by their number and range."""
    settings = []
    for name, value in method.non_default_settings().items():
        if isinstance(value, dict) and len(value) > 3:
            value = f"{min(value.values())} to {max(value.values())} at {len(value)} sites"
        settings.append(f"{name}={value}")
    return f"{type(method).__name__}({', '.join(settings)})" if settings else type(method).__name__


@dataclass(frozen=True)
class DesignCost:
    """What one candidate would cost, or why there is none."""

    trainable: int = 0
    """Trainable parameters, heads included."""
    bytes: int = 0
    """Of its file."""
    problem: str = ""
    """What the method says of this model, where it cannot be built on it."""

    def over(self, budget: BudgetConfig) -> str:
        """What it has too much of; "" within the budget."""
        limits = {
            "trainable parameters": (self.trainable, budget.max_trainable_parameters),
            "bytes": (self.bytes, budget.max_bytes),
        }
        found = [f"{n:,} {name} of {most:,}" for name, (n, most) in limits.items() if most is not None and n > most]
        return ", ".join(found)


def count_design(method: Method, survey: Survey, head_parameters: int) -> DesignCost:
    """By the closed form of the method at the sites it selects; nothing is built."""
    try:
        sites = method.sites(survey)
        kept = method.inference_form()
        trainable = method.num_parameters(sites) + head_parameters
        return DesignCost(trainable, VALUE_BYTES * (kept.num_parameters(sites) + head_parameters))
    except KitoutError as error:
        return DesignCost(problem=str(error))


def identity(method: Method, lr: float, survey: Survey) -> str:
    """Of designs that train the same adapter: words that select the same sites are the same."""
    settings = {name: value for name, value in method.model_dump(mode="json").items() if name not in SELECTIONS}
    sites = [[site.path, site.port, site.channels] for site in method.sites(survey)]
    return json.dumps([type(method).__name__, settings, f"{lr:.3g}", sites], sort_keys=True, default=str)
