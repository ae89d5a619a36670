"""Conversion of one adapter into another form: to LoRA of some rank, to trained copies, from a prompt to a prefix.

What is lost is measured and bounded by `max_residual`, before anything is added to the kit. It rests on
`arithmetic.fuse` with one adapter, and on the prefill of prompts; it knows no rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.base.site import Site
from kitout.delta import KeyValue
from kitout.errors import ConfigError, RouteError, UnknownAdapter, suggest
from kitout.fuse.arithmetic import combined_changes, fuse
from kitout.fuse.changes import Places, ProductChange
from kitout.fuse.lora.build_lora import as_written, check_plain
from kitout.fuse.lora.targets import selected
from kitout.fuse.residual import FusedAdapter, Residual
from kitout.fuse.result import NewAdapter, parse_drop
from kitout.fuse.rules import RuleOptions, rule_of
from kitout.fuse.sources import Source, sources_of
from kitout.fuse.truncate import product_squares, rank_for, singular_squares
from kitout.kit import Kit
from kitout.methods.lora import LoRA
from kitout.methods.prefix_tuning import PrefixTuning
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import check_name
from kitout.runtime.routing.compile import RouteCompiler
from kitout.runtime.state import KitState
from kitout.runtime.virtual_tokens.positions import TextEntry


@torch.no_grad()
def convert(
    kit: Kit,
    source: str,
    name: str,
    *,
    to: LoRA | PrefixTuning | Literal["dense"],
    max_residual: float = 0.1,
    drop: str | None = None,
) -> FusedAdapter:
    """A new adapter `name` on the kit that does what `source` does, in another form; heads and usage go along.

    to: LoRA(rank=8) or LoRA(energy=0.99) for any adapter that folds into weights; "dense" for trained copies;
    PrefixTuning() for a prompt before causal blocks, of the prompt's length. max_residual: ConfigError, naming a rank
    that would do, where more than this share of the change (its norm) is lost. drop: "biases norms other", what a LoRA
    may leave out; it counts in the residual. A composition is converted as the one change that it makes.

    Raises what `combine` raises; RouteError where the prefix is to sit where a prompt has no keys.
    """
    state = kit.state
    state.check_attached()
    check_name(state, name)
    state.check_unmerged(f"converting {source!r}")
    if source not in state:
        raise UnknownAdapter(f"convert: no adapter is called {source!r}: {suggest(str(source), state.names)}")
    if isinstance(max_residual, bool) or not isinstance(max_residual, (int, float)) or not 0 <= max_residual <= 1:
        raise ConfigError(f"max_residual is a share of the change, from 0 to 1, found {max_residual!r}")
    adapter = state[source]
    note = {"how": "convert", "weights": {source: 1.0}}
    if isinstance(to, PrefixTuning):
        return _prompt_to_prefix(
            NewAdapter(state, Places(state.survey), name, [Source(adapter, source, [adapter])], note=note), adapter, to
        )
    if adapter.prompts and not adapter.by_module:
        raise ConfigError(
            f"{source!r} is a prompt: it converts to=PrefixTuning() before causal blocks, and to no weights"
        )
    if isinstance(to, LoRA):
        check_plain(to)
    elif to != "dense":
        raise ConfigError(f"to={to!r}: write LoRA(rank=8), LoRA(energy=0.99), 'dense', or PrefixTuning() for a prompt")

    def check(residual: Residual) -> None:
        if residual.total > max_residual:
            asked = sum(residual.asked.values())
            rank = _rank_that_holds(state, adapter, max_residual, asked) if isinstance(to, LoRA) else None
            would_do = f"LoRA(rank={rank}) would do" if rank is not None else "no rank would do: too much is left out"
            form = "trained copies" if isinstance(to, str) else as_written(to)
            shares = ", ".join(f"{role} {share:.2g}" for role, share in sorted(residual.by_role.items()))
            raise ConfigError(
                f"{source!r} as {form} loses {residual.total:.3g} of its change (by role: {shares}), more than "
                f"max_residual={max_residual:g}; {would_do}, or allow more with max_residual="
            )

    return fuse(state, name, [adapter], [1.0], rule_of("sum"), RuleOptions(), 1.0, 0, to, parse_drop(drop), note, check)


def _rank_that_holds(state: KitState, adapter: Adapter, max_residual: float, asked: float) -> int | None:
    """The smallest rank, the same at every site, at which no more than this is lost."""
    places = Places(state.survey)
    spectra: list[Tensor] = []
    held = 0.0
    for place, combined in combined_changes(
        state, places, sources_of(state, [adapter]), [1.0], rule_of("sum"), RuleOptions(), 1.0, 0
    ):
        if place.site is None or not combined.square:
            continue
        change = combined.change
        squares = product_squares(change.a, change.b) if isinstance(change, ProductChange) else singular_squares(change)
        spectra.append(squares / place.scale**2)
        held += float(spectra[-1].sum())
    outside = max(0.0, asked - held)
    return rank_for(spectra, outside if outside > 1e-9 * asked else 0.0, max_residual**2 * asked)


# ---- a prompt as a prefix ------------------------------------------------------------------------------------------


def _prompt_to_prefix(new: NewAdapter, adapter: Adapter, to: PrefixTuning) -> FusedAdapter:
    """The keys and values that the prompt has at every attention, as a prefix of its length."""
    state, source = new.state, adapter.name
    parts = [part for each in adapter.prompts.values() for part in each]
    towers = [tower for tower in state.survey.towers if tower.path in adapter.prompts]
    if not parts or adapter.by_module or adapter.prefixes:
        raise ConfigError(
            f"to=PrefixTuning(): {source!r} is {type(adapter.method).__name__}, and only a prompt converts"
        )
    if not all(tower.causal for tower in towers):
        raise ConfigError(f"{source!r} stands before bidirectional blocks: what it computes there depends on the text")
    if any(part.delta.after_first_token for part in parts):
        raise ConfigError(
            f"{source!r} comes after the first token of the text, and what it computes depends on that token"
        )
    if len(state.survey.towers) > 1 and any(s.role == "kv.cross" for s in state.survey.kv_sites):
        raise ConfigError(f"{source!r} is a prompt of a decoder that reads an encoder: it depends on the text there")
    length = parts[0].delta.num_tokens
    if to.encoder is not None or ("length" in to.model_fields_set and to.length != length):
        raise ConfigError(
            f"to={as_written(to)}: the prompt has {length} tokens, so write PrefixTuning() without length and encoder"
        )
    method = to.model_copy(update={"length": length, "init": "random"})
    sites = selected(state, method)
    values = dict(_key_values(state, adapter, sites, [tower.path for tower in towers]))
    new.heads = dict.fromkeys(adapter.heads_by_path(), adapter)
    return FusedAdapter(new.register(method, sites, values), new.residual, new.dropped)


def _key_values(
    state: KitState, adapter: Adapter, sites: Sequence[Site], towers: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The prefix of each attention, [T, 2, H_kv, d_h], by the name it has in a file."""
    found: dict[str, KeyValue] = {}
    with state.active.lock, eval_mode(state.base, state.modules):
        route = RouteCompiler({adapter.name: adapter}, state.hooks, state.survey, state.active).compile(adapter.name)
        for hook, program in route.programs:
            if isinstance(program, TextEntry) and program.tower.path in towers and program.prefill is not None:
                found |= program.prefill.run_alone(state.base.get_submodule(hook.path))
    if missing := [site.path for site in sites if site.path not in found]:
        raise RouteError(f"{adapter.name!r} computes no keys at {', '.join(missing[:4])}: choose layers= and places=")
    shared = {site.path for site in state.survey.kv_sites if site.shares_kv_of}  # they see the prefix of another
    if beyond := found.keys() - {site.path for site in sites} - shared:
        raise ConfigError(f"to: the prefix leaves out {', '.join(sorted(beyond)[:4])}, where the prompt has keys")
    for site in sites:
        k, v = found[site.path]
        yield f"{site.key}.prefix", torch.stack((k[0].transpose(0, 1), v[0].transpose(0, 1)), 1)
