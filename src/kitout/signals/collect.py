"""One pass over batches with a probe at every linear site: nothing is updated, and the model stays as it was.

Gradient energy and Fisher mass come from products with a random A, so no gradient of a weight is held. What needs one
(GoRA's mean |W * G|, He et al. 2025, arXiv 2502.12171; LoRA-GA's start) takes further passes, each for as many sites as
fit a limit of memory. It knows a kit, a loss and batches, and no task and no file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.eval_mode import eval_mode
from kitout.base.select import COMPOSITE_ROLES, word_for
from kitout.base.site import Site
from kitout.base.weights import weight_matrix
from kitout.errors import ConfigError, NotMergeable, TargetError
from kitout.kit import Kit
from kitout.runtime.adapter import Adapter
from kitout.signals.site_probe import GradientRecorder, InputRecorder, ProbeDelta, SiteProbe, SketchRecorder
from kitout.signals.site_signals import Signals, SiteSignals

LossFn = Callable[[Kit, Any], Tensor]
PositionsFn = Callable[[Any], Sequence[Tensor]]
WHOLE_SVD = 768  # the smaller side of a gradient that is decomposed whole; a larger one by random projections
GRADIENT_BYTES = 2**30  # of the gradients that are held at once


def collect_signals(
    kit: Kit,
    batches: Sequence[Any],
    loss: LossFn,
    *,
    positions: PositionsFn | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    targets: str = "all-linear",
    layers: str = "all",
    rank: int = 32,
    directions: int = 32,
    gora: bool = False,
    loraga: int = 0,
    seed: int = 0,
    gradient_bytes: int = GRADIENT_BYTES,
    on_batch: Callable[[int, int], None] = lambda _done, _total: None,
) -> Signals:
    """What these batches say about the selected sites. loss: (kit, batch) -> a number with its gradient.

    positions: of a batch, masks [B, T] of its trained positions; a site takes the first of its input's shape, and all
    positions where none has it. heads: modules that replace modules of the model meanwhile, by path; copies are used.
    rank: of the probes. directions: of the inputs that are kept; 0: none. gora: also mean |W * G|. loraga: the highest
    rank that LoRA(init="loraga") shall start with; 0: none. gradient_bytes: of the gradients that these two may hold at
    once; the fewer, the more passes. on_batch: called with the batches done and their number, over all passes.
    """
    batches = list(batches)
    for name, value, least in (("rank", rank, 1), ("directions", directions, 0), ("loraga", loraga, 0)):
        if value < least:
            raise ConfigError(f"signals: {name} must be at least {least}, found {value}")
    if not batches:
        raise ConfigError("signals: there are no batches")
    with eval_mode(kit, kit.base, grad=True), _probes(kit, targets, layers, heads or {}) as probes:
        sites = [site for site in probes.sites if isinstance(probes.delta(site), ProbeDelta)]
        groups = _groups_within(sites, gradient_bytes) if gora or loraga else []
        progress = _BatchCount(on_batch, len(batches) * (1 + len(groups)))
        inputs = InputRecorder(directions) if directions else None
        sketches = {site: SketchRecorder(site, rank, seed, inputs) for site in sites}
        _record(probes, sketches)
        for batch in batches:
            if inputs is not None:
                inputs.begin_batch([mask.bool() for mask in positions(batch)] if positions is not None else [])
            for sketch in sketches.values():
                sketch.batch_size = _batch_size(batch)
            _run_backward(kit, batch, loss, probes)
            for sketch in sketches.values():
                sketch.finish_batch()
            progress.count()
        found: dict[Site, dict[str, Any]] = {site: {} for site in sites}
        for group in groups:
            recorders = {site: GradientRecorder(site) for site in group}
            _record(probes, recorders)
            for batch in batches:
                _run_backward(kit, batch, loss, probes)
                progress.count()
            for site, recorder in recorders.items():
                found[site] = _from_gradient(site, recorder.gradient, gora, loraga, seed)
    paths = [site.path for site in kit.survey.sites]
    return Signals(
        {site.path: _signals_of(site, sketches[site], paths, found[site]) for site in sites},
        len(batches),
        probes.left_out,
    )


@contextmanager
def _probes(kit: Kit, targets: str, layers: str, heads: Mapping[str, nn.Module]) -> Iterator[Adapter]:
    """The probes as the active adapter; afterwards they are gone."""
    for site in kit.sites(targets, layers):
        is_linear = site.kind == "linear" and site.role not in COMPOSITE_ROLES
        if is_linear and site.channels is None and site.port != "in" and site.layer is not None:
            continue
        raise TargetError(
            f"signals: {site.path} ({site.role}) is no whole linear module of a block; choose targets such as "
            "'all-linear' or 'attn.* mlp.*'"
        )
    name = "probe-sites"
    while name in kit:
        name += "_"
    adapter = kit.add(
        name,
        SiteProbe(targets=targets, layers=layers),
        heads={path: copy.deepcopy(module) for path, module in heads.items()},
    )
    try:
        with kit.use(name):
            yield adapter
    finally:
        kit.remove(name)


def _record(probes: Adapter, recorders: Mapping[Site, Any]) -> None:
    """Probes without a recorder do nothing."""
    for site in probes.sites:
        delta = probes.delta(site)
        assert isinstance(delta, ProbeDelta)
        delta.recorder = recorders.get(site)


def _run_backward(kit: Kit, batch: Any, loss: LossFn, probes: Adapter) -> None:
    """One forward and backward that leave no gradient anywhere."""
    value = loss(kit, batch)
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise ConfigError(
            "signals: the loss has to be a tensor of one number with a gradient, computed by the kit that it is given; "
            f"found {value if isinstance(value, Tensor) else type(value).__name__}"
        )
    recording = [delta for _, delta in probes.site_deltas() if isinstance(delta, ProbeDelta) and delta.recorder]
    torch.autograd.grad(value, [delta.anchor for delta in recording], allow_unused=True)


def _batch_size(batch: Any) -> int:
    """The first dimension of what the batch holds first; 0 where that is no tensor."""
    inputs = batch if isinstance(batch, Mapping) else getattr(batch, "inputs", None)
    first = next(iter(inputs.values()), None) if isinstance(inputs, Mapping) else None
    return int(first.shape[0]) if isinstance(first, Tensor) and first.ndim else 0


def _groups_within(sites: Sequence[Site], num_bytes: int) -> list[list[Site]]:
    """The sites in order, in groups whose gradients (float32) fit together; a larger one is alone."""
    groups: list[list[Site]] = []
    left = 0
    for site in sites:
        size = 4 * site.d_in * site.d_out
        if not groups or size > left:
            groups.append([])
            left = num_bytes
        groups[-1].append(site)
        left -= size
    return groups


def _from_gradient(site: Site, gradient: Tensor | None, gora: bool, loraga: int, seed: int) -> dict[str, Any]:
    if gradient is None:
        gradient = torch.zeros(site.d_out, site.d_in)
    found: dict[str, Any] = {}
    if gora:
        try:
            w = weight_matrix(site.module, site.weight_name).detach()
        except NotMergeable as reason:
            raise ConfigError(f"signals: mean |W * G| at {site.path}: {reason}; leave out gora=True") from None
        found["weight_gradient"] = float((w.to(gradient) * gradient).abs().mean())
    if loraga:
        found["gradient"] = _leading_part(gradient, 2 * loraga, seed)
    return found


def _leading_part(gradient: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, n], s [n], V [n, d_in] on CPU."""
    smaller = min(gradient.shape)
    if smaller <= WHOLE_SVD:
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    else:
        torch.manual_seed(seed)  # inside eval_mode, which restores the state
        left, values, right_t = torch.svd_lowrank(gradient, q=min(2 * num, smaller), niter=4)
        right = right_t.T
    return left[:, :num].float().cpu(), values[:num].float().cpu(), right[:num].float().cpu()


def _signals_of(site: Site, sketch: SketchRecorder, paths: Sequence[str], found: Mapping[str, Any]) -> SiteSignals:
    is_ambiguous = any(path != site.path and path.endswith(f".{site.path}") for path in paths)
    assert site.layer is not None
    return SiteSignals(
        path=site.path,
        word=f"re:{re.escape(site.path)}" if is_ambiguous else word_for(site.path),
        role=site.role,
        tower=site.tower,
        layer=site.layer,
        d_in=site.d_in,
        d_out=site.d_out,
        gradient_energy=sketch.gradient_energy(),
        fisher_mass=sketch.fisher_mass,
        explained_variance=() if sketch.svd is None else sketch.svd.explained(),
        num_positions=0 if sketch.svd is None else sketch.svd.num_rows,
        directions=None if sketch.svd is None else sketch.svd.directions(),
        **found,
    )


class _BatchCount:
    """Counts batches over all passes."""

    def __init__(self, on_batch: Callable[[int, int], None], total: int) -> None:
        self.on_batch, self.total, self.done = on_batch, total, 0

    def count(self) -> None:
        self.done += 1
        self.on_batch(self.done, self.total)
