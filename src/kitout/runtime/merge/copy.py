"""A plain copy: an ordinary model with adapters folded in and no trace of kitout; kit and base stay as they are.

A transformers model must survive save_pretrained and from_pretrained. It knows folded weights and how class swaps are
taken out, and no method.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from kitout.errors import Errors, NotMergeable
from kitout.route import RouteEntry
from kitout.runtime.hooks.class_swap import restore_class
from kitout.runtime.merge.commit import tied_parameters, write_weights
from kitout.runtime.merge.detached import copy_detached
from kitout.runtime.merge.fold import fold_all
from kitout.runtime.state import KitState


def plain_copy(state: KitState, entry: RouteEntry, check_saveable: bool = True) -> nn.Module:
    """A deep copy of the base without hooks, the adapters folded in as the entry runs them.

    For a transformers model the copy must survive save_pretrained and from_pretrained: a parameter that its config
    cannot bring back raises NotMergeable, unless check_saveable is off.
    """
    with state.active.lock:
        folded = fold_all({name: state[name] for name in state.names}, entry, state.survey)
    copied = copy_unhooked(state)
    tied = _tied_paths(copied)
    write_weights(copied, folded, state.survey.used_paths)
    if tied - _tied_paths(copied):
        _untie(copied)
    if check_saveable:
        _check_reloads(copied, state.base, has_heads=any(new.head is not None for new in folded.values()))
    return copied


def copy_unhooked(state: KitState) -> nn.Module:
    """The base as it was before attach, copied."""
    with state.active.lock:
        forget = [state.base.__dict__["_kitout"], state.active, *state.hooks.values()]
        copied = copy_detached(state.base, {id(o): None for o in forget})
    for module in copied.modules():
        for name in ("_kitout_hook", "_kitout_active", "_kitout"):
            if name in module.__dict__:
                restore_class(module, name)
    state.before_attach.restore(copied)
    return copied


def _tied_paths(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another."""
    return {path for tie in tied_parameters(model) for path, _ in tie}


def _untie(model: nn.Module) -> None:
    """Says in the config that the two uses of a table differ now, so that nothing ties them again."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    for owners in tied_parameters(model):  # what is still shared would be saved once, and be missing for the others
        for path, name in list(owners)[1:]:
            module = model.get_submodule(path)
            module._parameters[name] = nn.Parameter(owners[path, name].detach().clone(), requires_grad=False)
    config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _check_reloads(model: nn.Module, base: nn.Module, has_heads: bool) -> None:
    config: Any = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "save_pretrained", None)):
        return
    before = set(base.state_dict())
    gained = sorted(set(model.state_dict()) - before)
    errors = Errors(NotMergeable, "the merged model could not be saved and loaded again by transformers alone")
    for key in gained:
        errors.add(f"{key} would be new, and {type(config).__name__} cannot bring it back")
    if has_heads and not errors.messages:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(config)).state_dict()
        for key, value in model.state_dict().items():
            if key in twin and twin[key].shape != value.shape:
                shapes = f"{list(value.shape)}, and the config makes it {list(twin[key].shape)}"
                errors.add(f"{key} has the shape {shapes}")
    if errors.messages:
        errors.add("merge in place with kit.merge(name), or pass check_saveable=False for a copy that stays in memory")
    errors.raise_if_any()
