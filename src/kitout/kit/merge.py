"""Merging: adapters folded into the weights, in place and undone bit for bit, or into a plain copy.

Folding is computed in fp32 (fp64 for an fp64 base) in stack order and cast to the base's dtype once. Nothing changes
until every fold has succeeded. Old Parameters are kept as objects, so undoing costs nothing and ties come back. It
knows no method: only `Delta.fold`, and `base.weights` for how weights are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kitout.base import weights
from kitout.base.site import Site
from kitout.errors import Faults, NotMergeable
from kitout.kit.adapter import Adapter, Head
from kitout.kit.local import Local, Part
from kitout.kit.tap import uninstall

if TYPE_CHECKING:
    from kitout.kit.kit import Kit

Pair = tuple[Tensor, Tensor | None]


@dataclass
class Backup:
    """A module's own Parameters, or the module itself where a head took its place."""

    owner: nn.Module
    parameters: dict[str, nn.Parameter | None]
    child: tuple[str, nn.Module] | None = None


@dataclass
class Folded:
    """The new values of one module: w, b of a matrix; scale, shift of a norm; or whole parameters by name."""

    site: Site
    pair: Pair | None
    whole: dict[str, Tensor] | None = None
    head: nn.Module | None = None


def merge(base: nn.Module, adapters: Sequence[Adapter]) -> dict[str, Backup]:
    """Folds the adapters in order into the base's weights; returns what `restore` needs."""
    return commit(base, fold_all(adapters))


def restore(backups: dict[str, Backup]) -> None:
    """Puts the old Parameters and modules back."""
    for backup in backups.values():
        if backup.child is not None:
            setattr(backup.owner, *backup.child)
        else:
            for name in [n for n in backup.owner._parameters if n not in backup.parameters]:
                del backup.owner._parameters[name]
            backup.owner._parameters.update(backup.parameters)


@torch.no_grad()
def fold_all(adapters: Sequence[Adapter]) -> dict[str, Folded]:
    """New weights for every module the adapters sit at; all faults collected, NotMergeable raised once."""
    folded: dict[str, Folded] = {}
    faults = Faults(NotMergeable, "cannot merge " + " then ".join(repr(a.name) for a in adapters))
    for path in dict.fromkeys(p for a in adapters for p in a.locals):
        locals_ = [a.locals[path] for a in adapters if path in a.locals]
        try:
            folded[path] = _fold_module(locals_)
        except NotMergeable as reason:
            if len(faults.items) < 8:
                faults.add(f"{path} ({locals_[0].name}): {reason}")
    faults.raise_if_any()
    return folded


def _fold_module(locals_: Sequence[Local]) -> Folded:
    parts = [p for local in locals_ for p in (*local.outs, *local.ins)]
    site = parts[0].site
    if isinstance(parts[-1].delta, Head):
        return Folded(site, None, head=parts[-1].delta.module)
    if site.kind == "other":
        return _fold_whole(site, locals_)
    norm = site.kind == "norm"
    pair = _start(site)
    for local in locals_:
        new = pair
        for part in local.outs:
            new = _fold_out(part, new, norm)
        for part in local.ins:
            new = _fold_in(part, new)
        pair = _lerp(pair, new, local.strength)
    return Folded(site, pair)


def _start(site: Site) -> Pair:
    """The module's weights in working precision; a norm starts as the identity that its deltas then scale and shift."""
    if site.kind == "norm":
        parameter = site.module._parameters.get("weight")
        if parameter is None:
            raise NotMergeable(f"{type(site.module).__name__} has no gain")
        one = torch.ones(parameter.numel(), 1, dtype=_working(parameter), device=parameter.device)
        return one, torch.zeros_like(one[:, 0])
    w, b = weights.matrix(site.module), weights.bias(site.module)
    return w.to(_working(w)), None if b is None else b.to(_working(w))


def _working(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _fold_out(part: Part, pair: Pair, norm: bool) -> Pair:
    w, b = pair
    if norm and not part.delta.elementwise:
        raise NotMergeable(f"{type(part.delta).__name__} is not elementwise, and a norm's weights are")
    span = part.site.span
    if span is None:
        return part.delta.fold(w, b)
    new_w, new_b = part.delta.fold(w[span], None if b is None else b[span])
    w = w.clone()
    w[span] = new_w
    if new_b is not None:
        b = w.new_zeros(w.shape[0]) if b is None else b.clone()
        b[span] = new_b
    return w, b


def _fold_in(part: Part, pair: Pair) -> Pair:
    """x' = D x + t before W: W' = W D, b' = b + W t. D is diagonal where the delta is elementwise."""
    w, b = pair
    if part.delta.elementwise:
        scale, shift = part.delta.fold(w.new_ones(w.shape[1], 1), None)
        new = w * scale[:, 0]
    else:
        matrix, shift = part.delta.fold(torch.eye(w.shape[1], dtype=w.dtype, device=w.device), None)
        new = w @ matrix
    if shift is not None:
        b = w @ shift if b is None else b + w @ shift
    return new, b


def _lerp(old: Pair, new: Pair, strength: float) -> Pair:
    if strength == 1.0:
        return new
    w = old[0] + strength * (new[0] - old[0])
    if old[1] is None and new[1] is None:
        return w, None
    zero = w.new_zeros(w.shape[0])
    old_b, new_b = (zero if b is None else b for b in (old[1], new[1]))
    return w, old_b + strength * (new_b - old_b)


def _fold_whole(site: Site, locals_: Sequence[Local]) -> Folded:
    """A module that is no matrix and no norm: only deltas that carry whole parameters can be folded."""
    now = {n: p.detach().to(_working(p)) for n, p in site.module.named_parameters(recurse=False)}
    for local in locals_:
        for part in (*local.outs, *local.ins):
            new = part.delta.values()
            if new is None:
                raise NotMergeable(f"{type(part.delta).__name__} has no place in a {type(site.module).__name__}")
            now = {n: torch.lerp(v, new[n].to(v.dtype), local.strength) for n, v in now.items()}
    return Folded(site, None, whole=now)


def commit(base: nn.Module, folded: dict[str, Folded]) -> dict[str, Backup]:
    """Writes folded weights into a model (the base, or a plain copy of it); undone if a write is refused."""
    backups: dict[str, Backup] = {}
    try:
        for path, new in folded.items():
            module = base.get_submodule(path)
            if new.head is not None:
                parent, _, leaf = path.rpartition(".")
                owner = base.get_submodule(parent)
                backups[path] = Backup(owner, {}, (leaf, module))
                setattr(owner, leaf, copy.deepcopy(new.head).requires_grad_(False))
                continue
            backups[path] = Backup(module, dict(module._parameters))
            _write(path, module, new)
    except NotMergeable:
        restore(backups)
        raise
    return backups


def _write(path: str, module: nn.Module, new: Folded) -> None:
    try:
        if new.whole is not None:
            for name, value in new.whole.items():
                old = module._parameters[name]
                assert old is not None
                module._parameters[name] = nn.Parameter(value.to(old.dtype), requires_grad=False)
        elif new.pair is not None and new.site.kind == "norm":
            weights.replace_gain(module, new.pair[0][:, 0], new.pair[1])
        elif new.pair is not None:
            weights.replace_weight(module, *new.pair)
    except NotMergeable as reason:
        raise NotMergeable(f"{path}: {reason}") from None


def plain_copy(kit: Kit, names: Sequence[str], in_memory: bool = False) -> nn.Module:
    """A deep copy of the base without taps, the adapters folded in.

    For a transformers model the copy must survive save_pretrained and from_pretrained: a parameter that its config
    cannot bring back raises NotMergeable, unless `in_memory` says that it need not.
    """
    folded = fold_all([kit[n] for n in names])
    copied = untapped_copy(kit)
    untied = _tied_paths(copied) & set(folded)
    commit(copied, folded)
    if untied:
        _untie(copied)
    if not in_memory:
        _check_reloads(copied, kit.base)
    return copied


def untapped_copy(kit: Kit) -> nn.Module:
    """The base as it was before attach, copied."""
    with kit.live.lock:
        forget = [kit, kit.live, *kit._taps.values()]
        copied: nn.Module = copy.deepcopy(kit.base, {id(o): None for o in forget})
    for module in copied.modules():
        for name in ("_kitout_tap", "_kitout_live", "_kitout"):
            if name in module.__dict__:
                uninstall(module, name)
    kit._state.restore(copied)
    return copied


def _tied_paths(model: nn.Module) -> set[str]:
    """Modules whose weight is also another module's."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _untie(model: nn.Module) -> None:
    """Says in the config that the two uses of a table differ now, so that neither loading nor saving ties them again."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _check_reloads(model: nn.Module, base: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "save_pretrained", None)):
        return
    before = set(base.state_dict())
    gained = sorted(set(model.state_dict()) - before)
    faults = Faults(NotMergeable, "the merged model could not be saved and loaded again by transformers alone")
    for key in gained:
        faults.add(f"{key} would be new, and {type(config).__name__} cannot bring it back")
    if faults.items:
        faults.add("merge in place with kit.merge(name), or pass in_memory=True for a copy that is not to be saved")
    faults.raise_if_any()
