"""Intruder dimensions: new directions that an adapter put among the strongest of a weight (Shuttleworth et al., 2024).

Of the first 10 left singular vectors of W + dW those whose largest |cosine| to any of W is below 0.5; what a model has
forgotten lies there (arXiv 2410.21228). Small matrices are decomposed exactly; of wide ones first the strongest
directions by a randomized SVD, and all of them only where these do not decide. It knows changes of weights and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kitout.base.weights import weight_matrix
from kitout.errors import Errors, NotMergeable, RouteError
from kitout.fuse.changes import Places, as_dense
from kitout.fuse.sources import Source, read_changes
from kitout.kit import Kit
from kitout.route import RouteEntry
from kitout.runtime.merge.foldable import check_foldable, expand_foldable
from kitout.runtime.merge.pairs import working_dtype

FIRST, COSINE = 10, 0.5
EXACT_SIZE = 1024  # the smaller side of a matrix that is decomposed as a whole
KNOWN = 128  # directions of a wide matrix that are tried first


@dataclass(frozen=True)
class Spectrum:
    """Of one adapter. (The names are keys of results.json.)"""

    matrices: Mapping[str, int] = field(default_factory=dict)
    """Intruders by the name of the changed weight."""
    by_role: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By role: changed matrices, and intruders in all of them."""
    refused: str = ""
    """Why there is none: the adapter has no form in weights."""

    @property
    def total(self) -> int:
        """Intruders in all matrices."""
        return sum(self.matrices.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        roles = {role: {"matrices": n, "intruders": found} for role, (n, found) in self.by_role.items()}
        return {"total": self.total, "by_role": roles, "matrices": dict(self.matrices), "refused": self.refused}

    def rows(self) -> list[tuple[str, ...]]:
        """A table by role, its head first; empty where there is none."""
        rows = [(role, str(n), f"{found} ({found / n:.1f} each)") for role, (n, found) in self.by_role.items()]
        return [] if self.refused else [("role", "matrices", f"intruders among the first {FIRST}"), *rows]

    def line(self) -> str:
        """The same in one sentence."""
        if self.refused:
            return f"it has no form in weights: {self.refused}"
        return f"{self.total} intruder dimensions in {len(self.matrices)} matrices"


@torch.no_grad()
def measure_spectrum(
    kit: Kit, routes: Mapping[str, RouteEntry], log: Callable[[str], None] = lambda _line: None
) -> dict[str, Spectrum]:
    """By route the intruder dimensions of every matrix of the base that it changes. log: gets a line now and then."""
    places = Places(kit.state.survey)
    by_name = {name: kit.state[name] for name in kit.state.names}
    found: dict[str, Spectrum] = {}
    for name, route in routes.items():
        log(f"intruder dimensions of {name} ...")
        try:
            entry, adapters = expand_foldable(route, by_name, kit.state.survey)
            errors = Errors(NotMergeable, name)
            check_foldable(adapters, errors)
            for adapter in adapters:
                if not adapter.method.mergeable and not errors.messages:
                    errors.add(f"{adapter.name!r} is a {type(adapter.method).__name__}")
            errors.raise_if_any()
            found[name] = _of_source(kit, places, Source(adapters[0], entry, adapters))
        except (NotMergeable, RouteError) as error:
            found[name] = Spectrum(refused=str(error))
    return found


def _of_source(kit: Kit, places: Places, source: Source) -> Spectrum:
    matrices: dict[str, int] = {}
    by_role: dict[str, tuple[int, int]] = {}
    for place, (change,) in read_changes(kit.state, places, [source]):
        if place.site is None or change is None:
            continue
        weight = weight_matrix(place.site.module)
        w = weight.to(working_dtype(weight)) * place.scale
        number = count_intruders(w, as_dense(change).to(w))
        matrices[place.name] = number
        count, total = by_role.get(place.role, (0, 0))
        by_role[place.role] = count + 1, total + number
    return Spectrum(matrices, by_role)


def count_intruders(w: Tensor, change: Tensor, first: int = FIRST, cosine: float = COSINE) -> int:
    """How many of the first left singular vectors of w + change are none of w's. Both [d_out, d_in]."""
    first = min(first, *w.shape)
    if not change.any():
        return 0
    if min(w.shape) <= EXACT_SIZE:
        new = torch.linalg.svd(w + change, full_matrices=False).U[:, :first]
        return int((_largest_cosines(w, new) < cosine).sum())
    new = _strongest(w + change, first)
    cosines = (_strongest(w, KNOWN).T @ new).abs()
    # w's vectors are orthonormal: what is left of a unit vector bounds the cosine to every other one
    left = (1 - cosines.square().sum(0)).clamp(min=0).sqrt()
    known = cosines.amax(0)
    is_open = (known < cosine) & (left >= cosine)
    if is_open.any():
        known[is_open] = _largest_cosines(w, new[:, is_open])
    return int((known < cosine).sum())


def _largest_cosines(w: Tensor, vectors: Tensor) -> Tensor:
    """Of each column the largest |cosine| to a left singular vector of w."""
    return (torch.linalg.svd(w, full_matrices=False).U.T @ vectors).abs().amax(0)


def _strongest(w: Tensor, number: int) -> Tensor:
    """The first left singular vectors; twice as many are computed, for those at the cut are mixtures."""
    number = min(number, min(w.shape) // 2)
    devices = [w.device] if w.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return torch.svd_lowrank(w, q=2 * number, niter=6)[0][:, :number]
