"""The state of one attached base: its sites, its adapters, the route in force, what is merged.

Everything below the facade takes this object: building, routing, merging, files. `Kit` holds one and is what users
see. It knows no files, no methods, and no forward of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import AdapterExists, KitDetached, MergeStateError, RouteError, UnknownAdapter, suggest
from kitout.route import Route, adapter_names
from kitout.runtime.adapter import Adapter
from kitout.runtime.base_state import BaseState
from kitout.runtime.hooks.class_swap import Hook, hook
from kitout.runtime.merge.commit import Backup
from kitout.runtime.modules.fast_path import layers_around
from kitout.runtime.routing.active import ActiveRoute, CompiledRoute
from kitout.runtime.routing.cache import RouteCache
from kitout.runtime.routing.compile import RouteCompiler
from kitout.runtime.training_watch import TrainingWatch
from kitout.runtime.virtual_tokens.compile import modules_to_hook


class KitState:
    """Named adapters on one frozen base, and how they act now."""

    base: nn.Module
    """The frozen model."""
    survey: Survey
    """Its towers, blocks and sites."""
    modules: nn.ModuleDict
    """The adapters as children of the kit; a name's dots are written %2E."""
    active: ActiveRoute
    """The route in force, per context and sticky."""
    hooks: dict[str, Hook]
    """Where our code runs, by module path."""
    merged_names: tuple[str, ...]
    """The adapters folded into the base now, in order."""
    backups: dict[str, Backup]
    """What the merge replaced, by path."""
    unproven: set[str]
    """Paths of sites that no forward has been seen to run."""
    is_detached: bool
    """`Kit.detach` was called."""
    training_watch: TrainingWatch
    """Notices an adapter that no optimizer holds."""
    graphs: Any
    """The graphs of its blocks (`runtime.graphs`), which it only keeps; None where nothing is compiled."""

    def __init__(self, base: nn.Module, survey: Survey) -> None:
        self.base, self.survey = base, survey
        self.modules = nn.ModuleDict()
        self.active = ActiveRoute()
        self.hooks = {}
        self.merged_names = ()
        self.backups = {}
        self.unproven = set() if survey.proven else {s.path for s in survey.sites}
        self.is_detached = False
        self.training_watch = TrainingWatch()
        self.graphs = None
        self.before_attach = BaseState.capture(base)
        self._adapters: dict[str, Adapter] = {}
        self._route_cache = RouteCache()

    # ---- adapters ----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return list(self._adapters)

    @property
    def adapters(self) -> list[Adapter]:
        return list(self._adapters.values())

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UnknownAdapter(f"no adapter is called {name!r}: {suggest(name, self._adapters)}")
        return self._adapters[name]

    def insert(self, adapter: Adapter, check_usable: bool = False) -> None:
        """Takes in an adapter that was built for this base. AdapterExists if another has taken its name since.

        The parts of a composition are frozen.

        check_usable: RouteError, and nothing is taken in, where `use` could not activate it.
        """
        with self.active.lock:
            self.check_free(adapter.name)
            paths = [*adapter.by_module, *adapter.input_relays, *modules_to_hook(adapter, self.survey)]
            for path in [*paths, *layers_around(self.base, paths)]:
                self.hook_at(path)
            if check_usable:
                adapters = {**self._adapters, adapter.name: adapter}
                RouteCompiler(adapters, self.hooks, self.survey, self.active).compile(adapter.name)
            for part in adapter.method.part_names():
                self[part].requires_grad_(False)
            self.modules[_key(adapter.name)] = adapter
            adapter.train(self.modules.training)
            self._adapters[adapter.name] = adapter
            self.refresh_base_mode()

    def discard(self, name: str) -> None:
        """Forgets an adapter. RouteError while it is in use: here, in any `with`, or by the sticky route."""
        adapter = self[name]
        if whole := self._compositions_of(name):
            raise RouteError(f"{name!r} is a part of {', '.join(map(repr, whole))}: remove({whole[-1]!r}) first")
        with self.active.lock:
            if self.active.is_used(name):
                raise RouteError(f"{name!r} is active: use(None) or another route before remove({name!r})")
            self.active.forget(name)
            del self.modules[_key(adapter.name)]
            del self._adapters[name]
            self.forget_routes(name)

    def names_with_parts(self, names: Iterable[str]) -> list[str]:
        """These adapters and the parts of the compositions among them, each once."""
        found: dict[str, None] = {}
        for name in names:
            if name not in found:
                found[name] = None
                if name in self:  # else it was removed, while the route of some context still names it
                    found |= dict.fromkeys(self.names_with_parts(self[name].method.part_names()))
        return list(found)

    def _compositions_of(self, name: str) -> list[str]:
        """The adapters that this one is a part of, those of other compositions last."""
        return [each for each in self._adapters if each != name and name in self.names_with_parts([each])]

    # ---- the route ---------------------------------------------------------------------------------------------

    @property
    def route(self) -> Route:
        """The route in force in this context; None while adapters are merged, and after `detach`."""
        return None if self.merged_names or self.is_detached else self.active.route

    def compiled_route(self) -> CompiledRoute:
        """The compiled form of the route in force."""
        return self.compile(self.route)

    def compile(self, route: Route) -> CompiledRoute:
        """The compiled form of a route, kept for the next time. RouteError where adapters cannot be combined so."""
        compiled = self._route_cache.get(route)
        if compiled is None:
            compiled = RouteCompiler(self._adapters, self.hooks, self.survey, self.active).compile(route)
            self._route_cache.put(compiled)
        return compiled

    def forget_routes(self, name: str) -> None:
        """Compiles the routes that name this adapter anew."""
        for each in (name, *self._compositions_of(name)):
            self._route_cache.forget(each)
        if name in self.names_with_parts(adapter_names(self.active.installed.route)):
            self.active.install(self.compiled_route())

    def hook_at(self, path: str) -> Hook:
        """The hook of a module, installed on first use."""
        return self.hooks.setdefault(path, hook(path, self.base.get_submodule(path)))

    # ---- checks ------------------------------------------------------------------------------------------------

    def check_attached(self) -> None:
        """KitDetached, if `detach` has been called."""
        if self.is_detached:
            raise KitDetached("this kit was detached from its model: attach(model) makes a new one")

    def check_free(self, name: str) -> None:
        """AdapterExists, if the name is taken."""
        if name in self:
            raise AdapterExists(f"an adapter called {name!r} exists: remove({name!r}) first, or choose another name")

    def check_unmerged(self, action: str) -> None:
        """MergeStateError, if adapters are folded into the base now."""
        if self.merged_names:
            raise MergeStateError(f"{self.merged_text} merged into the base: unmerge() before {action}")

    @property
    def merged_text(self) -> str:
        """What is merged, as a message names it: "'a' is", "'a', 'b' are"."""
        return f"{', '.join(map(repr, self.merged_names))} {'is' if len(self.merged_names) == 1 else 'are'}"

    # ---- the base ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def device_at(self, site: Site) -> torch.device:
        """Of a site's module; where that has no parameter, as a dropout has none, of the nearest module around it."""
        module, path = site.module, site.path
        while (device := next((p.device for p in module.parameters()), None)) is None and path:
            path = path.rpartition(".")[0]
            module = self.base.get_submodule(path)
        return device or self.device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.base.parameters() if p.is_floating_point())

    def set_base_mode(self, training: bool) -> None:
        """Training mode of the base, or eval mode where all that is trained asks for it (no dropout, no drop-path)."""
        trained = [a.method for a in self._adapters.values() if any(p.requires_grad for p in a.parameters())]
        in_eval = bool(trained) and all(method.trains_in_eval_mode for method in trained)
        type(self.base).__dict__.get("frozen_train", nn.Module.train)(self.base, training and not in_eval)
        for module in self.base.modules():
            if in_eval and getattr(module, "gradient_checkpointing", False):
                module.training = (
                    training  # else its activations would not be recomputed; its children stay in eval mode
                )

    def refresh_base_mode(self) -> None:
        """The base's mode after what is trained has changed; left as it is where no method asks for eval mode."""
        if self.modules.training and any(adapter.method.trains_in_eval_mode for adapter in self._adapters.values()):
            self.set_base_mode(True)


def _key(name: str) -> str:
    return "@" + name.replace(".", "%2E")
