"""What a fused adapter does not hold of what was asked for, in all and by site, and the result that carries it.

Residual: the norm of the difference over the norm of what was asked for, over weights (Frobenius). It knows sites'
paths and roles and numbers, and nothing of how adapters are fused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kitout.runtime.adapter import Adapter


@dataclass
class Residual:
    """How much of a change is missing. 0: nothing, 1: all of it."""

    asked: dict[str, float] = field(default_factory=dict)
    """Site path -> square of the norm of what was asked for."""
    missing: dict[str, float] = field(default_factory=dict)
    """Site path -> square of the norm of what is missing."""
    roles: dict[str, str] = field(default_factory=dict)
    """Site path -> role."""

    def add(self, path: str, role: str, asked: float, missing: float) -> None:
        """One more tensor of a site."""
        self.asked[path] = self.asked.get(path, 0.0) + asked
        self.missing[path] = self.missing.get(path, 0.0) + missing
        self.roles.setdefault(path, role)

    @property
    def total(self) -> float:
        """Over all sites together."""
        return _share(sum(self.missing.values()), sum(self.asked.values()))

    @property
    def by_site(self) -> dict[str, float]:
        """Site path -> its own residual."""
        return {path: _share(self.missing[path], asked) for path, asked in self.asked.items()}

    @property
    def by_role(self) -> dict[str, float]:
        """Role -> the residual over its sites."""
        sums: dict[str, tuple[float, float]] = {}
        for path, asked in self.asked.items():
            missing, all_asked = sums.get(self.roles[path], (0.0, 0.0))
            sums[self.roles[path]] = missing + self.missing[path], all_asked + asked
        return {role: _share(*pair) for role, pair in sums.items()}


def _share(missing: float, asked: float) -> float:
    return math.sqrt(missing / asked) if asked > 0 else 0.0


@dataclass
class FusedAdapter:
    """What `combine`, `convert` and `extract` return."""

    adapter: Adapter
    """The new adapter, which the kit has under its name."""
    residual: Residual
    """What it does not hold of what was asked for."""
    dropped: Mapping[str, str]
    """Parameter -> what it is (biases, norms, ...), of what was left out."""

    @property
    def name(self) -> str:
        """The adapter's."""
        return self.adapter.name

    def __repr__(self) -> str:
        method = self.adapter.method
        settings = ", ".join(f"{k}={v!r}" for k, v in method.non_default_settings().items())
        settings = settings if len(settings) <= 200 else settings[:200] + "..."
        lost = f", {len(self.dropped)} parameters left out" if self.dropped else ""
        return (
            f"{self.name!r}: {type(method).__name__}({settings}), {len(self.adapter.sites)} sites, "
            f"residual {self.residual.total:.3g}{lost}"
        )
