"""A and B of a low-rank map from what data say about its site: EVA's and LoRA-GA's starts.

EVA (Paischer et al. 2024, arXiv 2410.07170): A = the leading right singular vectors of the site's inputs, B = 0.
LoRA-GA (Wang et al. 2024, arXiv 2407.05000, code Outsider565/LoRA-GA): of the gradient's singular vectors A takes the
right ones 1 to r and B the left ones r + 1 to 2 r, both times d_out ** (1/4) / sqrt(gamma), gamma = 16; the change is
counted from there. (PEFT 0.21 scales B alone, and by its singular values.) It knows no selection and no kit.
"""

from __future__ import annotations

from kitout.base.site import Site
from kitout.base.weights import fan_in
from kitout.errors import Errors
from kitout.method import SiteStart
from kitout.methods.deltas.low_rank import LowRankDelta

SCALE = 1 / 4.0  # 1 / sqrt(gamma)


def start_from_inputs(site: Site, delta: LowRankDelta, start: SiteStart | None, errors: Errors) -> None:
    """EVA. An error where the start knows too few directions of this site."""
    directions, rank = None if start is None else start.directions, len(delta.a)
    if directions is None or directions.shape[1] != fan_in(site):
        errors.add(f"the start has no input directions of {site.path} ({site.role})")
    elif len(directions) < rank:
        errors.add(
            f"the start has {len(directions)} input directions of {site.path}, and its rank is {rank}: collect more "
            f"(signals(..., directions={rank}), over at least as many positions), or choose a lower rank"
        )
    else:
        delta.a.copy_(directions[:rank])


def start_from_gradient(site: Site, delta: LowRankDelta, start: SiteStart | None, errors: Errors) -> None:
    """LoRA-GA. Where the gradient has fewer than 2 r directions, B takes the last r of them."""
    gradient, rank = None if start is None else start.gradient, len(delta.a)
    if gradient is None or site.channels is not None or gradient[2].shape[1] != fan_in(site):
        whole = f", and select {site.path} whole" if site.channels is not None else ""
        errors.add(f"the start has no gradient of {site.path} ({site.role}): signals(..., loraga={rank}){whole}")
        return
    left, _, right = gradient
    used = min(2 * rank, site.d_out, fan_in(site))
    if len(right) < used:
        errors.add(
            f"the start has {len(right)} directions of the gradient of {site.path}, and rank {rank} takes {2 * rank}: "
            f"signals(..., loraga={rank})"
        )
        return
    scale = SCALE * site.d_out**0.25
    delta.a.copy_(scale * right[:rank])
    delta.b.copy_(scale * left[:, used - rank : used])
    delta.subtract_start(delta.a.detach(), delta.b.detach())
