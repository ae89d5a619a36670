"""An adapter: the Deltas one Method built on one base, under one name, with the heads that travel with it.

It is an ordinary nn.Module that holds its own parameters and nothing of the base. Grouped by module and port
(`by_module`), it is what routes are compiled from. It knows nothing of other adapters, of rows or of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kitout.base.site import Site
from kitout.delta import Delta
from kitout.method import Method
from kitout.runtime.head import Head
from kitout.runtime.modules.module_adapter import InputRelay, ModuleAdapter, SiteDelta


class Adapter(nn.Module):
    """One named adapter.

    method: its config. sites: where it sits, in model order. deltas: one per site, by `site.key`. shared: the module
    all Deltas may use, or None. heads: replaced modules by their path (dots written as slashes).
    """

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
        self.seed: int | None = None
        self._strength = 1.0
        self.metadata: dict[str, Any] = {}  # what its file says about it, in its author's words
        self.deltas = nn.ModuleDict(dict(deltas))
        self.shared = shared
        self.heads = nn.ModuleDict({path.replace(".", "/"): Head(m) for path, m in heads.items()})
        self.by_module: dict[str, ModuleAdapter] = {}
        self.input_relays: dict[str, list[InputRelay]] = {}  # module path -> sources its input has to be left in
        self.prefixes: dict[str, SiteDelta] = {}  # attention path -> its keys and values
        self.prompts: dict[str, list[SiteDelta]] = {}  # tower -> tokens for its sequence, in block order

    def group_by_module(self, head_sites: Sequence[Site]) -> None:
        """Groups the Deltas by the module they act on."""
        ins: dict[str, list[SiteDelta]] = {}
        outs: dict[str, list[SiteDelta]] = {}
        params: dict[str, list[SiteDelta]] = {}
        ports = {"in": ins, "param": params}
        for site, delta in [(s, self.delta(s)) for s in self.sites] + [(s, self.head(s)) for s in head_sites]:
            source = None if site.input_from is None else InputRelay()
            if source is not None and site.input_from is not None:
                self.input_relays.setdefault(site.input_from, []).append(source)
            part = SiteDelta(site, delta, source)
            if site.port == "kv":
                self.prefixes[site.path] = part
            elif site.port == "tokens":
                self.prompts.setdefault(site.tower, []).append(part)
            else:
                ports.get(site.port, outs).setdefault(site.path, []).append(part)
        for path in {**ins, **outs, **params}:
            here = [tuple(port.get(path, ())) for port in (ins, outs, params)]
            self.by_module[path] = ModuleAdapter(self.name, here[0], here[1], here[2])

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
        return new

    def delta(self, site: Site) -> Delta:
        delta = self.deltas[site.key]
        assert isinstance(delta, Delta)
        return delta

    def head(self, site: Site) -> Delta:
        delta = self.heads[site.path.replace(".", "/")]
        assert isinstance(delta, Delta)
        return delta

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        for local in self.by_module.values():
            local.strength = value

    def extra_repr(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.method.non_default_settings().items())
        return f"{self.name!r}, {type(self.method).__name__}({settings}), {len(self.sites)} sites"


def conflict_with_head(adapters: Sequence[Adapter]) -> str | None:
    """Where one adapter sits inside a module that another one's head replaces, so that it would never run; or None."""
    for adapter in adapters:
        for head in (path.replace("/", ".") for path in adapter.heads):
            for other in adapters:
                inside = [p for p in other.by_module if p.startswith(f"{head}.") and other is not adapter]
                if inside:
                    return f"{other.name!r} sits at {inside[0]}, inside {head}, which {adapter.name!r} replaces"
    return None
