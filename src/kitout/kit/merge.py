"""Merging: adapters folded into the weights, in place and undone bit for bit, or into a plain copy.

Folding is computed in fp32 (fp64 for an fp64 base) in stack order and cast to the base's dtype once. Nothing changes
until every fold has succeeded. Old Parameters are kept as objects, so undoing costs nothing and ties come back. It
knows no method: only `Delta.fold`, and `base.weights` for how weights are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kitout.base import weights
from kitout.base.site import Site
from kitout.errors import Faults, NotMergeable
from kitout.kit.adapter import Adapter, Head, hidden
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
    """The new values of one module: w, b of a matrix, or parameters by name, or another module."""

    site: Site
    pair: Pair | None = None
    whole: dict[str, Tensor] | None = None
    head: nn.Module | None = None


def merge(base: nn.Module, adapters: Sequence[Adapter], alive: Container[str]) -> dict[str, Backup]:
    """Folds the adapters in order into the base's weights; returns what `restore` needs. alive: paths that run."""
    return commit(base, fold_all(adapters), alive)


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
    if found := hidden(adapters):
        faults.add(found)
    for adapter in adapters:
        for part in [*adapter.pasts.values(), *(p for each in adapter.tokens.values() for p in each)][:2]:
            faults.add(f"{part.site.path} ({adapter.name}): positions added to a sequence are in no weight")
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
    site = locals_[0].site
    last = next((p for local in reversed(locals_) for p in reversed(local.outs)), None)
    if last is not None and isinstance(last.delta, Head):
        if locals_[-1].strength != 1.0:
            raise NotMergeable(f"a head at strength {locals_[-1].strength:g} is a blend of two modules")
        return Folded(site, head=last.delta.module)
    if site.kind in ("linear", "conv", "embedding"):
        return Folded(site, pair=_fold_matrix(site, locals_))
    return Folded(site, whole=_fold_parameters(site, locals_))


def _fold_matrix(site: Site, locals_: Sequence[Local]) -> Pair:
    """Weight and bias of a linear, a convolution or a table, each adapter on what the one before has left."""
    if not all(part.delta.replaces for local in locals_ for part in local.outs):  # a whole copy is exact anywhere
        weights.check_plain_map(site)
    w, b = weights.matrix(site.module), weights.bias(site.module)
    pair = start = w.to(working(w)), None if b is None else b.to(working(w))
    for local in locals_:
        pair = fold_local(local, pair, start)
    return pair


def fold_local(local: Local, pair: Pair, start: Pair) -> Pair:
    """One adapter on what is there. start: the frozen values, for a Delta that replaces the module."""
    new = pair
    for part in local.outs:
        new = _fold_out(part, start if part.delta.replaces else new)
    pair = new = lerp(pair, new, local.strength)  # as in forward: output and input are blended each on its own
    for part in local.ins:
        new = _fold_in(part, new)
    return lerp(pair, new, local.strength)


def working(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _fold_out(part: Part, pair: Pair) -> Pair:
    w, b = pair
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
    if part.site.kind != "linear":
        raise NotMergeable(f"{type(part.delta).__name__} acts on the input of a {part.site.kind}, not of a linear")
    if part.delta.elementwise:
        scale, shift = part.delta.fold(w.new_ones(w.shape[1], 1), None)
        new = w * scale[:, 0]
    else:
        matrix, shift = part.delta.fold(torch.eye(w.shape[1], dtype=w.dtype, device=w.device), None)
        new = w @ matrix
    if shift is not None:
        b = w @ shift if b is None else b + w @ shift
    return new, b


def lerp(old: Pair, new: Pair, strength: float) -> Pair:
    if strength == 1.0:
        return new
    w = old[0] + strength * (new[0] - old[0])
    if old[1] is None and new[1] is None:
        return w, None
    zero = w.new_zeros(w.shape[0])
    old_b, new_b = (zero if b is None else b for b in (old[1], new[1]))
    return w, old_b + strength * (new_b - old_b)


def _fold_parameters(site: Site, locals_: Sequence[Local]) -> dict[str, Tensor]:
    """The parameters, by name, of a norm or of a module that is no matrix either."""
    own = [n for n, _ in site.module.named_parameters(recurse=False)]
    held = [n for local in locals_ for part in local.params for n in part.site.names]
    parameters = {n: site.module.get_parameter(n) for n in (*own, *held)}
    start = now = {n: p.to(working(p)) for n, p in parameters.items() if p.is_floating_point()}
    for local in locals_:
        if local.ins:
            raise NotMergeable(f"{type(local.ins[0].delta).__name__} acts on the input of a module that is no linear")
        new = now
        for part in (*local.outs, *local.params):
            new = _fold_values(part, start if part.delta.replaces else new)
        if local.strength != 1.0:
            new = {n: torch.lerp(now.get(n, torch.zeros_like(v)), v, local.strength) for n, v in new.items()}
        now = new
    return {n: v for n, v in now.items() if v is not start.get(n)}


def _fold_values(part: Part, now: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, after one Delta: whole values, or scale and shift folded into a norm."""
    site, delta = part.site, part.delta
    values = delta.values()
    if values is not None:
        return now | {n: v.to(now[n].dtype) for n, v in values.items()}
    if site.kind != "norm" or not delta.elementwise:
        raise NotMergeable(f"{type(delta).__name__} has no place in a {type(site.module).__name__}")
    if "weight" not in now:
        raise NotMergeable(f"{type(site.module).__name__} has no gain")
    one = torch.ones_like(now["weight"])
    scale, shift = delta.fold(one[:, None], None)
    return weights.regained(site.module, now, scale[:, 0], shift)


def commit(base: nn.Module, folded: dict[str, Folded], alive: Container[str]) -> dict[str, Backup]:
    """Writes folded weights into a model (the base, or a plain copy of it); undone if a write is refused.

    alive: paths of modules that run. Parameters that were tied stay so where every use of them came out the same.
    """
    backups: dict[str, Backup] = {}
    ties = _ties(base)
    try:
        for path, new in folded.items():
            module = base.get_submodule(path)
            if new.head is not None:
                parent, _, leaf = path.rpartition(".")
                owner = base.get_submodule(parent)
                backups[path] = Backup(owner, {}, (leaf, module))
                setattr(owner, leaf, copy.deepcopy(new.head).requires_grad_(False))
                continue
            for home in {name.rpartition(".")[0] for name in ("", *(new.whole or {}))}:
                owner = module.get_submodule(home)
                backups[f"{path}.{home}" if home else path] = Backup(owner, dict(owner._parameters))
            _write(path, module, new)
        for owners in ties:
            _tie_again(base, owners, alive, backups)
    except BaseException:
        restore(backups)
        raise
    return backups


def _write(path: str, module: nn.Module, new: Folded) -> None:
    try:
        if new.whole is not None:
            weights.replace_parameters(module, new.whole)
        elif new.pair is not None:
            weights.replace_weight(module, *new.pair)
    except NotMergeable as reason:
        raise NotMergeable(f"{path or 'the model'}: {reason}") from None


def plain_copy(kit: Kit, names: Sequence[str], in_memory: bool = False) -> nn.Module:
    """A deep copy of the base without taps, the adapters folded in.

    For a transformers model the copy must survive save_pretrained and from_pretrained: a parameter that its config
    cannot bring back raises NotMergeable, unless `in_memory` says that it need not.
    """
    with kit.live.lock:
        folded = fold_all([kit[n] for n in names])
    copied = untapped_copy(kit)
    tied = _tied_paths(copied)
    commit(copied, folded, kit.found.alive)
    if tied - _tied_paths(copied):
        _untie(copied)
    if not in_memory:
        _check_reloads(copied, kit.base)
    return copied


def untapped_copy(kit: Kit) -> nn.Module:
    """The base as it was before attach, copied."""
    with kit.live.lock:
        forget = [kit, kit.live, *kit.taps.values()]
        copied: nn.Module = copy.deepcopy(kit.base, {id(o): None for o in forget})
    for module in copied.modules():
        for name in ("_kitout_tap", "_kitout_live", "_kitout"):
            if name in module.__dict__:
                uninstall(module, name)
    kit._state.restore(copied)
    return copied


def _ties(model: nn.Module) -> list[dict[tuple[str, str], nn.Parameter]]:
    """Every parameter that several modules hold, by (module path, name)."""
    owners: dict[int, dict[tuple[str, str], nn.Parameter]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), {})[path, name] = p
    return [held for held in owners.values() if len(held) > 1]


def _tied_paths(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another."""
    return {path for held in _ties(model) for path, _ in held}


def _tie_again(
    base: nn.Module,
    owners: dict[tuple[str, str], nn.Parameter],
    alive: Container[str],
    backups: dict[str, Backup],
) -> None:
    """One Parameter for all owners again, if all that run have been given the same new values."""
    now = {(path, name): base.get_submodule(path)._parameters[name] for path, name in owners}
    new = [p for key, p in now.items() if p is not owners[key] and p is not None]
    kept = [path for (path, name), p in now.items() if p is owners[path, name] and path in alive]
    if not new or kept or not all(p.shape == new[0].shape and torch.equal(p, new[0]) for p in new):
        return
    for path, name in owners:
        module = base.get_submodule(path)
        backups.setdefault(path, Backup(module, dict(module._parameters)))
        module._parameters[name] = new[0]


def _untie(model: nn.Module) -> None:
    """Says in the config that the two uses of a table differ now, so that nothing ties them again."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    for owners in _ties(model):  # what is still shared would be saved once, and not be found for the others
        for path, name in list(owners)[1:]:
            module = model.get_submodule(path)
            module._parameters[name] = nn.Parameter(owners[path, name].detach().clone(), requires_grad=False)
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
