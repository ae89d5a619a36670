"""What a pass over data has found, by site: values to rank sites by, and the starts of `LoRA(init="eva")` and "loraga".

It knows numbers and tensors, and neither how they were found nor what is decided by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kitout.method import SiteStart


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteSignals(SiteStart):
    """Of one linear site. Gradients are of the sum of the batches' losses."""

    path: str
    """Of the module."""
    word: str
    """What selects this module and no other: its path, or a regular expression where another path ends alike."""
    role: str
    """Its role in the block."""
    tower: str
    """The stack of its block."""
    layer: int
    """Its block's index."""
    d_in: int
    """Width of the input."""
    d_out: int
    """Width of the output."""
    gradient_energy: float
    """|G|_F^2 of the weight's gradient G, estimated: E = |G|_F^2, relative standard deviation <= sqrt(2 / rank)."""
    fisher_mass: float
    """The sum over the rows of all batches of the same for the row's own gradient; a batch whose rows a site mixes
    (experts) counts as one row."""
    explained_variance: tuple[float, ...]
    """By direction of the inputs at trained positions: its share of their sum of squares."""
    num_positions: int
    """Positions these were taken of."""
    weight_gradient: float | None = None
    """mean |W * G|, exact; None: not collected (gora=True)."""

    @property
    def cost(self) -> int:
        """Trainable parameters of one rank here."""
        return self.d_in + self.d_out

    @property
    def max_rank(self) -> int:
        """The rank above which a low-rank map has nothing to add."""
        return min(self.d_in, self.d_out)

    def to_dict(self) -> dict[str, Any]:
        """Its numbers as plain values, without tensors."""
        names = ("path", "role", "tower", "layer", "d_in", "d_out", "gradient_energy", "fisher_mass", "num_positions")
        values = {name: getattr(self, name) for name in names}
        return {**values, "weight_gradient": self.weight_gradient, "explained_variance": list(self.explained_variance)}


class Signals(Mapping[str, SiteSignals]):
    """Path -> what was found there, in model order. `kit.add(..., start=signals)` takes it whole."""

    def __init__(self, sites: Mapping[str, SiteSignals], num_batches: int, left_out: Mapping[str, str]) -> None:
        self._sites, self.num_batches, self.left_out = dict(sites), num_batches, dict(left_out)

    def __getitem__(self, path: str) -> SiteSignals:
        return self._sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"Signals({len(self)} sites, {self.num_batches} batches)"

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values."""
        return {
            "batches": self.num_batches,
            "sites": [one.to_dict() for one in self.values()],
            "left_out": self.left_out,
        }
