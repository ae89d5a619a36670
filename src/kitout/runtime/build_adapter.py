"""Building an adapter for a kit: the name, the sites, the Deltas; every check before anything changes.

It knows kits, sites and the Method interface, and nothing of routes or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.dummy_batch import dummy_batch
from kitout.base.site import Site
from kitout.delta import Delta, KeyValue
from kitout.errors import (
    ConfigError,
    Errors,
    InvalidAdapterName,
    NotMergeable,
    RouteError,
    TargetError,
    UnknownAdapter,
    UnusedSite,
    suggest,
)
from kitout.format import ADAPTER_NAME_PATTERN, ADAPTER_NAME_RULE
from kitout.method import Method, SiteStart
from kitout.route import Route, adapter_names
from kitout.runtime.adapter import Adapter
from kitout.runtime.hooks.class_swap import unhook
from kitout.runtime.left_out import experts_hint, leave_out
from kitout.runtime.parts import check_parts, sites_of_part
from kitout.runtime.routing.active import CompiledRoute
from kitout.runtime.routing.compile import RouteCompiler
from kitout.runtime.state import KitState

NOT_COMBINED = "it combines nothing here, so none of its parts acts"


def build_adapter(
    state: KitState,
    name: str,
    method: Method,
    seed: int | None,
    heads: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    start: Mapping[str, SiteStart] | None = None,
) -> Adapter:
    """A new adapter for this kit, not yet one of its adapters."""
    check_name(state, name)
    if not isinstance(method, Method):
        raise ConfigError(f"add() takes a method with its settings, such as LoRA(rank=8), found {method!r}")
    check_parts(state, name, method)
    state.check_unmerged(f"adding {name!r}")
    head_sites = [head_site(state, path) for path in heads]
    _check_heads_run(state, name, heads)
    heads = {path: check_head(state, path, module) for path, module in heads.items()}
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed must be a whole number or None, found {seed!r}")
    sites, left_out = select_sites(state, method, heads, name)
    check_sites(name, sites, heads, method)
    # On CPU whatever the base's device, so that a seed means the same values everywhere. The lock comes first: else two
    # threads that add adapters would draw from each other's seed.
    with _without_adapters(state), torch.random.fork_rng(devices=[], enabled=seed is not None), torch.no_grad():
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs, for good
        with torch.device("cpu"):  # also where the caller has another default
            shared = method.build_shared(sites)
            deltas = {site.key: _build_delta(method, site, shared) for site in sites}
        method.init_from_forward({site: deltas[site.key] for site in sites}, partial(base_key_values, state))
        method.init_from_start({site: deltas[site.key] for site in sites}, start)
    adapter = Adapter(name, method, sites, deltas, shared, heads)
    adapter.seed, adapter.left_out = seed, left_out
    adapter.to(dtype=dtype or torch.promote_types(state.dtype, torch.float32))
    move_to_sites(state, adapter)
    adapter.group_by_module(head_sites)
    return adapter


@contextmanager
def _without_adapters(state: KitState) -> Iterator[None]:
    """No adapter is active while initial values are read off the model's modules."""
    with state.active.lock:
        before = state.active.installed
        state.active.install(CompiledRoute(None))
        try:
            yield
        finally:
            state.active.install(before)


def base_key_values(state: KitState, ids: Tensor) -> dict[str, KeyValue]:
    """The base's own keys and values of token ids [1, T], by attention path, each [H_kv, T, d_h]."""
    if not any(tower.embedder is not None for tower in state.survey.towers):
        raise ConfigError("init from a text: this model reads no tokens")
    key_values: dict[str, KeyValue] = {}
    ids = ids.to(state.device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if state.config.is_encoder_decoder else {})
    for site in state.survey.kv_sites:
        state.hook_at(site.path)
    with state.active.lock, eval_mode(state.base, state.modules):
        compiled = RouteCompiler({}, state.hooks, state.survey, state.active).compile(None, key_values)
        with state.active.prefill(compiled):
            state.base(**inputs, use_cache=False)
    return {path: (k[0], v[0]) for path, (k, v) in key_values.items()}


def cached_heads(state: KitState) -> int | None:
    """Heads of the keys in the base's own cache, which may be repeated for its queries; None where there is none."""
    batch = dummy_batch(state.base, 1)
    if batch is None or "use_cache" not in batch:
        return None
    with state.active.lock, eval_mode(state.base, state.modules), state.active.prefill(CompiledRoute(None)):
        cache = state.base(**{**batch, "use_cache": True}).get("past_key_values")
    layers = getattr(cache, "layers", ())
    return int(layers[0].keys.shape[1]) if layers else None


def _build_delta(method: Method, site: Site, shared: nn.Module | None) -> Delta:
    try:
        return method.build(site, shared)
    except NotMergeable as reason:  # it starts from the frozen weight, which cannot be read as a matrix
        raise ConfigError(
            f"{type(method).__name__}({method.non_default_settings()}) has no start at {site.path}: {reason}"
        ) from None


def check_name(state: KitState, name: str) -> None:
    """InvalidAdapterName or AdapterExists."""
    if not isinstance(name, str) or not ADAPTER_NAME_PATTERN.fullmatch(name):
        raise InvalidAdapterName(f"{name!r} cannot name an adapter: {ADAPTER_NAME_RULE}")
    state.check_free(name)


def check_strength(adapter: Adapter, value: float) -> None:
    """RouteError for a strength that what the adapter adds cannot have."""
    if adapter.prompts and value != 1.0:
        raise RouteError(
            f"{adapter.name!r} has tokens in the sequence: they are there or not, and have no strength; use(None) "
            "is without"
        )
    if adapter.prefixes and value < 0:
        raise RouteError(
            f"{adapter.name!r} has a prefix: its strength is a weight of attention, at least 0, found {value}"
        )


def check_known(state: KitState, requested: Route) -> None:
    """UnknownAdapter for every name in a route that no adapter carries, all in one."""
    errors = Errors(UnknownAdapter, "use")
    for name in dict.fromkeys(adapter_names(requested)):
        if name not in state:
            errors.add(f"no adapter is called {name!r}: {suggest(name, state.names)}")
    errors.raise_if_any()


def check_sites(name: str, sites: Sequence[Site], heads: Collection[str], method: Method) -> None:
    """TargetError for no site at all without a head or a route of its own, or for one site twice."""
    duplicates = [key for key, n in Counter(s.key for s in sites).items() if n > 1]
    if duplicates:
        raise TargetError(
            f"adapter {name!r} would sit twice at {', '.join(duplicates[:5])}: its targets select one site twice"
        )
    if not sites and not heads and method.fixed_route() is None:
        raise TargetError(f"adapter {name!r} would have no site at all in this model; see print(kit) for the roles")


def select_sites(state: KitState, method: Method, heads: Iterable[str], name: str) -> tuple[list[Site], dict[str, str]]:
    """The sites of the method, and path -> why of those left out (`left_out.py`).

    What the adapter's own heads replace is in neither: it would have no effect there.
    """
    parts = method.part_names()
    try:
        if parts:
            sites_of = {part: _outside(heads, sites_of_part(state, part)) for part in parts}
            selected = method.sites_over_parts(state.survey, sites_of)
        else:
            selected = method.sites(state.survey)
    except TargetError as error:
        hint = experts_hint(state.survey, str(error))
        raise TargetError(f"{error}\n  {hint}") if hint else error from None
    sites = _outside(heads, selected)
    if parts and sites:  # theirs run, or they would not be sites of the parts
        of_parts = dict.fromkeys(s.reader or s.path for each in sites_of.values() for s in each)
        return sites, {path: NOT_COMBINED for path in of_parts if all(s.path != path for s in sites)}
    return leave_out(state.survey, method, sites, name)


def _outside(heads: Iterable[str], sites: Iterable[Site]) -> list[Site]:
    """The sites that are not in what these heads replace."""
    return [s for s in sites if not any(f"{s.path}.".startswith(f"{h}.") for h in heads)]


def head_site(state: KitState, path: str) -> Site:
    """The site of a module that a head replaces."""
    try:
        module = state.base.get_submodule(path)
    except AttributeError:
        module = state.base
    if module is state.base:
        paths = [p for p, _ in state.base.named_modules()]
        raise TargetError(f"heads: the model has no module {path!r}: {suggest(path, paths)}")
    own = [s.batch_relation for s in state.survey.sites if s.path == path and s.channels is None]
    return Site(path=path, role="head", d_in=0, d_out=0, kind="other", module=module, batch_relation=[*own, "batch"][0])


def check_head(state: KitState, path: str, module: object) -> nn.Module:
    """A head as the adapter takes it: trainable, and without the hooks that a copy of the model's own module brings."""
    if not isinstance(module, nn.Module):
        raise TargetError(f"heads: {path!r} needs an nn.Module, found {module!r}")
    if any(m is module for m in state.base.modules()):
        raise TargetError(f"heads: {path!r} is given a module of the model itself: give a copy, copy.deepcopy(module)")
    for child in module.modules():
        if "_kitout_hook" in child.__dict__:
            unhook(child)
    return module.requires_grad_(True)


def _check_heads_run(state: KitState, name: str, heads: Iterable[str]) -> None:
    """UnusedSite for a head in place of a module that never runs (a table that only lends its values to others)."""
    for path in heads:
        if state.survey.proven and not any(f"{p}.".startswith(f"{path}.") for p in state.survey.execution_order):
            raise UnusedSite(
                f"adapter {name!r}: {path} never runs in this model's forward, so a head in its place would have no "
                "effect; give the path of a module that runs (see print(kit))"
            )


def move_to_sites(state: KitState, adapter: Adapter) -> None:
    """Moves each Delta to the device of the module it sits at."""
    for site in adapter.sites:
        adapter.delta(site).to(state.device_at(site))
    for module in (adapter.shared, adapter.heads):
        if module is not None:
            module.to(state.device)
