"""Merging in place: folded weights written into a model, and the old ones put back bit for bit.

Nothing changes until every fold has succeeded. Old Parameters are kept as objects, so undoing costs nothing and ties
come back. It knows how weights are stored through `base.weights` alone.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kitout.base import weights
from kitout.base.survey import Survey
from kitout.errors import NotMergeable
from kitout.route import RouteEntry
from kitout.runtime.adapter import Adapter
from kitout.runtime.merge.detached import copy_detached
from kitout.runtime.merge.fold import FoldedWeights, fold_all
from kitout.runtime.output_width import AttributesBefore, output_width, undo


@dataclass
class Backup:
    """A module's own Parameters, or the module itself where a head took its place."""

    owner: nn.Module
    """The module that has the Parameters or the child."""
    parameters: dict[str, nn.Parameter | None]
    """Its own Parameters, by name."""
    child: tuple[str, nn.Module] | None = None
    """The name and the module that a head replaced."""
    widths: AttributesBefore | None = None
    """What the model said of its output's width, where the head has another."""


def merge(base: nn.Module, adapters: Mapping[str, Adapter], entry: RouteEntry, survey: Survey) -> dict[str, Backup]:
    """Folds an entry's adapters into the base's weights; returns what `restore` needs."""
    return write_weights(base, fold_all(adapters, entry, survey), survey.used_paths)


def restore(backups: dict[str, Backup]) -> None:
    """Puts the old Parameters and modules back."""
    for backup in backups.values():
        if backup.child is not None:
            setattr(backup.owner, *backup.child)
            undo(backup.widths or [])
        else:
            for name in [n for n in backup.owner._parameters if n not in backup.parameters]:
                del backup.owner._parameters[name]
            backup.owner._parameters.update(backup.parameters)


def write_weights(base: nn.Module, folded: dict[str, FoldedWeights], used_paths: Container[str]) -> dict[str, Backup]:
    """Writes folded weights into a model (the base, or a plain copy of it); undone if a write is refused.

    used_paths: of modules that run. Parameters that were tied stay so where every use of them came out the same.
    """
    backups: dict[str, Backup] = {}
    ties = tied_parameters(base)
    width = output_width(base, {path: new.head for path, new in folded.items() if new.head is not None})
    try:
        for path, new in folded.items():
            module = base.get_submodule(path)
            if new.head is not None:
                parent, _, leaf = path.rpartition(".")
                owner = base.get_submodule(parent)
                backups[path] = Backup(owner, {}, (leaf, module))
                if width is not None and width.path == path:
                    backups[path].widths = width.write()
                dtype = weights.floating_dtype(module, weights.floating_dtype(base, torch.float32))
                setattr(owner, leaf, copy_detached(new.head).requires_grad_(False).to(dtype))
                continue
            for home in {name.rpartition(".")[0] for name in ("", *new.parameters)}:
                owner = module.get_submodule(home)
                home_path = ".".join(filter(None, (path, home)))
                backups.setdefault(home_path, Backup(owner, dict(owner._parameters)))
            try:
                weights.replace_parameters(module, new.parameters)
            except NotMergeable as reason:
                raise NotMergeable(f"{path or 'the model'}: {reason}") from None
        for owners in ties:
            _tie_again(base, owners, used_paths, backups)
    except BaseException:
        restore(backups)
        raise
    return backups


def tied_parameters(model: nn.Module) -> list[dict[tuple[str, str], nn.Parameter]]:
    """Every parameter that several modules hold, by (module path, name)."""
    owners: dict[int, dict[tuple[str, str], nn.Parameter]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), {})[path, name] = p
    return [tie for tie in owners.values() if len(tie) > 1]


def _tie_again(
    base: nn.Module,
    owners: dict[tuple[str, str], nn.Parameter],
    used_paths: Container[str],
    backups: dict[str, Backup],
) -> None:
    """One Parameter for all owners again, if all that run have been given the same new values."""
    now = {(path, name): base.get_submodule(path)._parameters[name] for path, name in owners}
    new = [p for key, p in now.items() if p is not owners[key] and p is not None]
    kept = [path for (path, name), p in now.items() if p is owners[path, name] and path in used_paths]
    if not new or kept or not all(p.shape == new[0].shape and torch.equal(p, new[0]) for p in new):
        return
    for path, name in owners:
        module = base.get_submodule(path)
        backups.setdefault(path, Backup(module, dict(module._parameters)))
        module._parameters[name] = new[0]
