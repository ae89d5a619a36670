"""An adapter: the Deltas one Method built on one base, under one name, with the heads that travel with it.

It is an ordinary nn.Module that holds its own parameters and nothing of the base. Grouped by module and port
(`by_module`), it is what routes are compiled from. It knows nothing of other adapters, of rows or of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.delta import Delta
from kitout.method import Method
from kitout.runtime.head import Head
from kitout.runtime.modules.module_adapter import InputRelay, ModuleAdapter, SiteDelta


class Adapter(nn.Module):
    """One named adapter."""

    name: str
    """What it is called on its kit."""
    method: Method
    """Its config."""
    sites: tuple[Site, ...]
    """Where it sits, in model order."""
    seed: int | None
    """Of its initial values; None: the global generator, or unknown."""
    metadata: dict[str, Any]
    """What its file says about it, in its author's words."""
    usage: dict[str, Any] | None
    """How it is used, as `files.usage_record` describes it; None where it was made without a task."""
    left_out: dict[str, str]
    """Path -> why, of what its targets select and nothing placed there would have an effect."""
    deltas: nn.ModuleDict
    """One Delta per site, by `site.key`."""
    shared: nn.Module | None
    """The module all Deltas may use."""
    heads: nn.ModuleDict
    """`Head`s by the path of the module they replace, dots written as slashes."""
    by_module: dict[str, ModuleAdapter]
    """What it does at each module, by path."""
    input_relays: dict[str, list[InputRelay]]
    """Module path -> the relays that take its input."""
    prefixes: dict[str, SiteDelta]
    """Attention path -> its keys and values."""
    prompts: dict[str, list[SiteDelta]]
    """Tower -> tokens for its sequence, in block order."""

    def __init__(
        self,
        name: str,
        method: Method,
        sites: Sequence[Site],
        deltas: Mapping[str, Delta],
        shared: nn.Module | None,
        heads: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.name, self.method, self.sites = name, method, tuple(sites)
        self.seed = None
        self._strength = 1.0
        self.metadata = {}
        self.usage = None
        self.left_out = {}
        self.deltas = nn.ModuleDict(dict(deltas))
        self.shared = shared
        self.heads = nn.ModuleDict({path.replace(".", "/"): Head(m) for path, m in heads.items()})
        self.by_module = {}
        self.input_relays = {}
        self.prefixes = {}
        self.prompts = {}

    def group_by_module(self, head_sites: Sequence[Site]) -> None:
        """Groups the Deltas by the module they act on."""
        self.by_module, self.input_relays, self.prefixes, self.prompts = {}, {}, {}, {}
        on_input: dict[str, list[SiteDelta]] = {}
        on_output: dict[str, list[SiteDelta]] = {}
        on_parameters: dict[str, list[SiteDelta]] = {}
        on_weights: dict[str, list[SiteDelta]] = {}
        on_parts: dict[str, list[SiteDelta]] = {}
        ports = {"in": on_input, "param": on_parameters, "weight": on_weights, "parts": on_parts}
        for site, delta in [(s, self.delta(s)) for s in self.sites] + [(s, self.head(s)) for s in head_sites]:
            relay = None
            if site.input_from is not None:
                relay = InputRelay()
                self.input_relays.setdefault(site.input_from, []).append(relay)
            part = SiteDelta(site, delta, relay)
            if site.port == "kv":
                self.prefixes[site.path] = part
            elif site.port == "tokens":
                self.prompts.setdefault(site.tower, []).append(part)
            else:
                path = site.path if site.reader is None else site.reader
                ports.get(site.port, on_output).setdefault(path, []).append(part)
        for path in {**on_input, **on_output, **on_parameters, **on_weights, **on_parts}:
            self.by_module[path] = ModuleAdapter(
                self.name,
                tuple(on_input.get(path, ())),
                tuple(on_output.get(path, ())),
                tuple(on_parameters.get(path, ())),
                tuple(on_weights.get(path, ())),
                tuple(on_parts.get(path, ())),
            )

    def prefixes_at(self, tower: str, role: str) -> list[SiteDelta]:
        """Its keys and values at the attentions of one kind in one stack."""
        return [part for part in self.prefixes.values() if (part.site.tower, part.site.role) == (tower, role)]

    def inference_form(self) -> Adapter:
        """The same adapter without what only its training needs; itself where there is nothing of the kind."""
        method = self.method.inference_form()
        if method is self.method:
            return self
        deltas = {site.key: self.delta(site).inference_form() for site in self.sites}
        new = Adapter(self.name, method, self.sites, deltas, None, {})
        new.heads, new.seed, new.metadata, new._strength = self.heads, self.seed, self.metadata, self._strength
        new.usage = self.usage
        return new

    def delta(self, site: Site) -> Delta:
        delta = self.deltas[site.key]
        assert isinstance(delta, Delta)
        return delta

    def site_deltas(self) -> list[tuple[Site, Delta]]:
        """Its sites with their Deltas, without heads."""
        return [(site, self.delta(site)) for site in self.sites]

    def head(self, site: Site) -> Delta:
        delta = self.heads[site.path.replace(".", "/")]
        assert isinstance(delta, Delta)
        return delta

    def heads_by_path(self) -> dict[str, nn.Module]:
        """The modules that replace modules of the model where it acts, by their paths."""
        heads = ((path.replace("/", "."), head) for path, head in self.heads.items())
        return {path: head.module for path, head in heads if isinstance(head, Head) and path in self.by_module}

    def penalty(self) -> Tensor | None:
        """What its Deltas add to a loss (`Delta.penalty`); None for nothing. See `Kit.penalty`."""
        penalties = [penalty for site in self.sites if (penalty := self.delta(site).penalty()) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def after_step(self, step: int, num_steps: int) -> None:
        """What its method does after an optimizer step (`Method.after_step`)."""
        self.method.after_step(dict(self.site_deltas()), step, num_steps)

    @property
    def has_dropout(self) -> bool:
        """What it adds in training is drawn anew for each row."""
        drops = any(module.p for module in self.modules() if isinstance(module, nn.Dropout))
        return drops or bool(self.method.model_dump().get("dropout", 0.0))

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        for module_adapter in self.by_module.values():
            module_adapter.strength = value

    def extra_repr(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.method.non_default_settings().items())
        return f"{self.name!r}, {type(self.method).__name__}({settings}), {len(self.sites)} sites"


def conflict_with_head(adapters: Sequence[Adapter]) -> str | None:
    """Where one adapter sits inside a module that another one's head replaces, so that it would never run; or None."""
    for adapter in adapters:
        for head in adapter.heads_by_path():
            for other in adapters:
                paths = [p for p, m in other.by_module.items() if p != head or m.on_weights]
                inside = [p for p in paths if f"{p}.".startswith(f"{head}.") and other is not adapter]
                if head in inside:
                    return f"{other.name!r} changes weights that {head} reads, and {adapter.name!r} replaces it"
                if inside:
                    return f"{other.name!r} sits at {inside[0]}, inside {head}, which {adapter.name!r} replaces"
    return None


def trained_and_read(adapters: Sequence[Adapter]) -> str | None:
    """A parameter that one adapter has its own copy of and another folds a change into; None if there is none."""
    parts = [(path, m) for adapter in adapters for path, m in adapter.by_module.items()]
    trained = {f"{path}.{n}".lstrip(".") for path, m in parts for p in m.on_parameters for n in p.site.parameter_names}
    read = (f"{path}.{n}" for path, m in parts for p in m.on_weights for n in p.read_names)
    return next((name for name in read if name in trained), None)
