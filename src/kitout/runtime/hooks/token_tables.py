"""A model's token tables exchanged or resized while a kit is attached.

transformers' own methods do it; the survey and the hooks then take the tables as they are now. An adapter that has
values for a row of a table, or a head in its place, cannot follow: that is refused before anything changes. It knows
tables by transformers' getters, and nothing of methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from kitout.base.find.module_shapes import leaf_shape
from kitout.errors import ConfigError
from kitout.runtime.hooks.class_swap import hooked_class, swap_class, unhook
from kitout.runtime.state import KitState

# Methods of a transformers model that exchange or resize its token tables.
CHANGES_TABLES = ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings")


def is_resize_to_own_size(model: Any, action: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A resize to no size, or to the size that the table has: it changes nothing."""
    size = args[0] if args else kwargs.get("new_num_tokens")
    has_it = size is None or size == model.get_input_embeddings().weight.shape[0]
    return action == "resize_token_embeddings" and has_it and kwargs.get("pad_to_multiple_of") is None


@contextmanager
def tables_change(state: KitState, action: str) -> Iterator[None]:
    """Refuses what adapters could not follow; afterwards survey and hooks know the tables as they are."""
    state.check_unmerged(action)
    before = _tables(state.base)
    for adapter in state.adapters:
        at_tables = sorted(before.keys() & adapter.by_module.keys())
        if at_tables:
            raise ConfigError(
                f"{action}: adapter {adapter.name!r} has values for {', '.join(at_tables)} as it is now, which would "
                f"not fit afterwards. Remove it first, kit.remove({adapter.name!r}), and add it anew to the changed "
                "model; adapters elsewhere stay"
            )
    with state.active.lock:
        yield
        _refresh(state, before)


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that holds the input or output embeddings' parameters, by path."""
    parameters = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        table = getattr(model, get)()
        parameters |= {id(p) for p in table.parameters()} if isinstance(table, nn.Module) else set()
    own = ((path, m) for path, m in model.named_modules())
    return {path: m for path, m in own if any(id(p) in parameters for p in m._parameters.values())}


def _refresh(state: KitState, before: dict[str, nn.Module]) -> None:
    """Sites and hooks at the tables: other modules and widths now, frozen like the rest."""
    changed: dict[str, Any] = {}
    for path, old in before.items():
        new = state.base.get_submodule(path)
        new.requires_grad_(False)
        shape = leaf_shape(new)
        if shape is not None:
            changed[path] = {"module": new, "d_in": shape.d_in, "d_out": shape.d_out}
        hook = state.hooks.get(path)
        if hook is not None and new is not old:
            unhook(old)
            hook.module = new
            swap_class(new, hooked_class, "_kitout_hook", hook)
    sites = tuple(
        replace(s, **changed[s.path]) if s.path in changed and s.channels is None else s for s in state.survey.sites
    )
    state.survey = replace(state.survey, sites=sites)
