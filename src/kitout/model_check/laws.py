"""The laws, one function per column of the table, each for one method on one kit.

Adapters get random values first, so that they have an effect; two of them, of different sizes where the method has a
size, share a batch with a row of the base. A KitoutError is a refusal; whoever calls decides what other errors are. It
knows the kit's public surface and no method.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import KitoutError, NotMergeable
from kitout.kit import Kit
from kitout.method import Method
from kitout.model_check.bare_base import NOISE_FACTOR, BareBase
from kitout.model_check.inputs import (
    CheckBatch,
    Values,
    difference,
    largest_difference,
    outputs_of,
    random_loss,
    row_of,
    worst,
)
from kitout.model_check.result import CheckCell, Column
from kitout.runtime.adapter import Adapter

NAMES = ("check-a", "check-b", "check-loaded")
SIZES = ("length", "width", "rank")  # settings that make a second adapter larger than the first
COPIED_BYTES = 256 * 2**20  # a base up to this size is also merged as a copy
NO_GRADIENT = 1e-7  # of the largest gradient: what rounding leaves of a zero


@dataclass(frozen=True)
class LawRun:
    """One method on one kit."""

    kit: Kit
    """The kit, without a route in force."""
    base: BareBase
    """What the base does by itself."""
    method: Method
    """The method that is checked."""

    @torch.no_grad()
    def values(self, route: object, batch: CheckBatch | None = None) -> Values:
        """The outputs under a route."""
        with self.kit.use(route):
            return outputs_of(self.kit.base, batch or self.base.plain)

    def judge(self, found: float, allowed: float, what: str, note: str = "") -> CheckCell:
        """ok or wrong by a measured difference; NaN and infinity are wrong."""
        if found <= allowed:
            return CheckCell("ok", note, found, allowed)
        detail = f"differs by {found:.1e}, allowed {allowed:.0e}"
        if not math.isfinite(found):
            detail = "is not finite" if math.isnan(found) else "has another shape"
        return CheckCell("wrong", f"{what} {detail}", found, allowed)


def add_adapters(run: LawRun, seed: int) -> None:
    """Two adapters with random values that have an effect. KitoutError where the method does not fit."""
    run.kit.add(NAMES[0], run.method, seed=seed)
    try:
        run.kit.add(NAMES[1], larger(run.method), seed=seed + 1)
    except KitoutError:
        run.kit.add(NAMES[1], run.method, seed=seed + 1)
    for number, name in enumerate(NAMES[:2]):
        for _ in range(4):
            randomize(run.kit[name], seed + number)
            if not largest_difference(run.values(name), run.base.values, run.base.fields) < 100 * run.base.tolerance:
                break


def larger(method: Method) -> Method:
    """The same method one size up, so that rows of one batch do not all have the same shapes."""
    settings = method.model_dump(exclude_unset=True)
    for name in SIZES:
        if isinstance(size := getattr(method, name, None), int):
            return type(method)(**{**settings, name: size + 1})
    return method


@torch.no_grad()
def randomize(adapter: Adapter, seed: int) -> None:
    """Every tensor moved off the value it has, so that nothing that matters is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter), alpha=0.1 if parameter.ndim < 2 else 0.05)


# ---- effect -------------------------------------------------------------------------------------------------------


def check_effect(run: LawRun) -> CheckCell:
    """The outputs change, stay finite and come again, every parameter has a gradient, off is the base bit for bit."""
    kit, base = run.kit, run.base
    values = run.values(NAMES[0])
    change = largest_difference(values, base.values, base.fields)
    if not math.isfinite(change):
        return run.judge(change, 0.0, "the output")
    if change <= base.tolerance:
        return CheckCell("wrong", "the adapter changes nothing in the output", change)
    off = largest_difference(run.values(None), base.values, base.fields)
    if off > (0.0 if kit.device.type == "cpu" else base.tolerance):
        return CheckCell("wrong", f"use(None) is not the base: it differs by {off:.1e}", off, 0.0)
    again = largest_difference(run.values(NAMES[0]), values, base.fields)
    if not again <= base.tolerance:
        return run.judge(again, base.tolerance, "the same call, after one of the base,")
    gradients = gradients_of(run, NAMES[0], base.plain, base.fields)
    largest = max((g.abs().max().item() for g in gradients.values() if g is not None and g.numel()), default=0.0)
    if not math.isfinite(largest):
        return CheckCell("wrong", "a gradient is not finite", largest)
    without = [n for n, g in gradients.items() if g is None or not g.abs().max() > NO_GRADIENT * largest]
    return _explain_missing(run, values, without) if without else CheckCell("ok", "", change)


def gradients_of(run: LawRun, route: object, batch: CheckBatch, fields: Any) -> dict[str, Tensor | None]:
    """Gradients of the first adapter's parameters, by name."""
    run.kit.zero_grad(set_to_none=True)
    with torch.enable_grad(), run.kit.use(route):
        loss = random_loss(outputs_of(run.kit.base, batch), fields)
        if loss.requires_grad:
            loss.backward()
    found = {n: None if p.grad is None else p.grad.detach().clone() for n, p in run.kit[NAMES[0]].named_parameters()}
    run.kit.zero_grad(set_to_none=True)
    return found


def _explain_missing(run: LawRun, values: Values, names: list[str]) -> CheckCell:
    """Why some parameters have no gradient: cut off, never applied, or without effect by the base's own mathematics.

    They are changed and the model runs again. If the output follows, the gradient was cut off on its way. If not even
    the module they act at gives another output, they are applied nowhere. Else the base itself ignores the change (the
    softmax takes a shift of all keys off again), or has not come to run that module with this batch.
    """
    adapter = run.kit[NAMES[0]]
    shown = f"{len(names)} of {len(list(adapter.parameters()))} parameters ({', '.join(names[:3])})"
    modules = {
        site.path: site.module
        for site in adapter.sites
        if any(name.startswith(f"deltas.{site.key}.") for name in names) and site.port in ("out", "in")
    }
    with _outputs_seen(modules) as before:
        run.values(NAMES[0])
    own = dict(adapter.named_parameters())
    kept = {name: own[name].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            own[name].add_(torch.randn(own[name].shape).to(own[name]), alpha=0.5)
    with _outputs_seen(modules) as after:
        change = largest_difference(run.values(NAMES[0]), values, run.base.fields)
    with torch.no_grad():
        for name, value in kept.items():
            own[name].copy_(value)
    if not change <= 10 * run.base.tolerance:
        return CheckCell("wrong", f"{shown}: no gradient, although the output depends on them", change)
    dead = [path for path, value in before.items() if difference(after[path], value) <= run.base.tolerance]
    if dead:
        return CheckCell("wrong", f"{shown}: applied nowhere at {', '.join(dead[:3])}")
    return CheckCell("ok", f"{shown}: without effect on this batch, by the base's own computation")


@contextmanager
def _outputs_seen(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The first tensor that each of these modules gives while it runs, by path."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(*call: Any) -> None:
            output = call[-1]
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                seen.setdefault(path, first.detach().clone())

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- rows ---------------------------------------------------------------------------------------------------------


def check_rows(run: LawRun) -> CheckCell:
    """Rows with an adapter, the base and another adapter are what each is alone, in outputs and gradients."""
    if run.base.rows_reason:
        return CheckCell("not applicable", run.base.rows_reason)
    found, allowed = 0.0, run.base.tolerance
    for kind, batch, noise in run.base.row_batches:
        for route in ([NAMES[0], None, NAMES[1]], [NAMES[1], NAMES[0], None]):
            together = run.values(route, batch)
            for i, entry in enumerate(route):
                alone = run.values(entry, batch.rows(i))
                for name, base_noise in noise.items():
                    limit = max(run.base.tolerance, NOISE_FACTOR * base_noise)
                    apart = largest_difference(row_of(together, i, batch.num_rows), alone, [name])
                    if not apart <= limit:
                        padding = f", {kind} padding" if kind else ""
                        return run.judge(apart, limit, f"row {i} ({entry or 'base'}{padding}), {name}")
                    found, allowed = max(found, apart), max(allowed, limit)
    _, batch, noise = run.base.row_batches[0]
    together_gradients = gradients_of(run, [NAMES[0], None, NAMES[1]], batch, noise)
    alone_gradients = gradients_of(run, NAMES[0], batch.rows(0), noise)
    apart = _gradient_difference(together_gradients, alone_gradients)
    if not apart <= 10 * allowed:
        return run.judge(apart, 10 * allowed, f"the gradient of row 0 ({NAMES[0]})")
    return CheckCell("ok", "", found, allowed)


def _gradient_difference(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None]) -> float:
    scale = max((g.abs().max().item() for g in want.values() if g is not None), default=0.0) or 1.0
    pairs = [(got[n], g) for n, g in want.items()]
    found = [((0.0 if a is None else a.double()) - (0.0 if b is None else b.double())) for a, b in pairs]
    return worst(d if isinstance(d, float) else d.abs().max().item() / scale for d in found)


# ---- merge, save, cache -------------------------------------------------------------------------------------------


def check_merge(run: LawRun) -> CheckCell:
    """Merged is what attached was; unmerge puts the base back bit for bit.

    In place, so that only the modules that change are held twice; a base of at most 256 MiB is also copied.
    """
    kit, base = run.kit, run.base
    want = run.values(NAMES[0])
    before = {name: id(p) for name, p in kit.base.named_parameters()}
    try:
        kit.merge(NAMES[0])
    except NotMergeable as error:
        if run.method.mergeable:
            raise
        return CheckCell("not applicable", str(error))
    try:
        with torch.no_grad():
            merged = outputs_of(kit.base, base.plain)
    finally:
        kit.unmerge()
    if before != {name: id(p) for name, p in kit.base.named_parameters()}:
        return CheckCell("wrong", "unmerge left other parameters than there were")
    found = largest_difference(merged, want, base.fields)
    cell = run.judge(found, base.tolerance, "the merged model")
    if cell.outcome == "ok" and sum(p.numel() * p.element_size() for p in kit.base.parameters()) <= COPIED_BYTES:
        with torch.no_grad():
            copied = outputs_of(kit.merged_copy(NAMES[0], check_saveable=False), base.plain)
        cell = run.judge(largest_difference(copied, want, base.fields), base.tolerance, "the merged copy")
    return cell


def check_save(run: LawRun) -> CheckCell:
    """Saved and loaded under another name: the same tensors and outputs, bit for bit."""
    kit = run.kit
    want = run.values(NAMES[0])
    with tempfile.TemporaryDirectory() as folder:
        kit.save(NAMES[0], Path(folder) / "adapter")
        loaded = kit.load(Path(folder) / "adapter", name=NAMES[2])
    try:
        ours, theirs = kit[NAMES[0]].inference_form().state_dict(), loaded.state_dict()
        if ours.keys() != theirs.keys():
            return CheckCell("wrong", f"other tensors: {', '.join(sorted(ours.keys() ^ theirs.keys())[:5])}")
        changed = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
        if changed:
            return CheckCell("wrong", f"tensors are not what was saved: {', '.join(changed[:5])}")
        allowed = 0.0 if kit.device.type == "cpu" else run.base.tolerance
        return run.judge(largest_difference(run.values(NAMES[2]), want, run.base.fields), allowed, "the output")
    finally:
        kit.remove(NAMES[2])


def check_cache(run: LawRun) -> CheckCell:
    """Calls with the cache give what full forwards give: for one adapter, and for rows with another each."""
    if not run.base.cached:
        return CheckCell("not applicable", run.base.cache_reason)
    routes: list[object] = [NAMES[0]]
    if not run.base.rows_reason:
        routes.append([NAMES[0], None, NAMES[1]])
    found, allowed, refusals = 0.0, run.base.tolerance, []
    for way, (call, batch, base_apart) in run.base.cached.items():
        limit = max(run.base.tolerance, NOISE_FACTOR * base_apart)
        for route in routes:
            try:
                with run.kit.use(route):
                    cached, uncached = call(run.kit.base, batch)
            except KitoutError as error:
                if isinstance(route, str):
                    raise
                refusals.append(f"{way}, rows: {error}")
                continue
            apart = difference(cached, uncached)
            if not apart <= limit:
                return run.judge(apart, limit, f"{way}{'' if isinstance(route, str) else ', rows'}: cached")
            found, allowed = max(found, apart), max(allowed, limit)
    return CheckCell("ok", "; ".join(refusals), found, allowed)


LAWS: Mapping[Column, Callable[[LawRun], CheckCell]] = {
    "effect": check_effect,
    "rows": check_rows,
    "merge": check_merge,
    "save": check_save,
    "cache": check_cache,
}
