"""The kit: named adapters on one frozen base, worn, routed, counted, merged and saved.

`attach(model)` finds the sites, freezes the base and changes nothing else; the kit then holds adapters and forwards
calls. What it does with tensors lives elsewhere: sites in `base`, routes in `bind`, weights in `merge`, files in
`kitout.files`. It knows no method and no architecture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import Detached, MergeState, RouteError, UnknownAdapter, suggest
from kitout.kit import merge as merging
from kitout.kit.adapter import Adapter
from kitout.kit.bare import BareState, Forward, disable_checkpointing, enable_checkpointing, keep_still, train_base
from kitout.kit.bind import bind
from kitout.kit.boundary import bounded, routed
from kitout.kit.build import build, check_known, check_name, check_strength
from kitout.kit.count import Count, count
from kitout.kit.firing import Firing
from kitout.kit.front import paths
from kitout.kit.live import Bound, Choice, Live
from kitout.kit.method import Method
from kitout.kit.plans import Plans
from kitout.kit.route import Route, names, route
from kitout.kit.tap import Tap, install, tap, uninstall, untap
from kitout.kit.worn import Worn

if TYPE_CHECKING:
    from os import PathLike


class Kit(nn.Module):
    """Named adapters on one frozen base. Made by `attach`; `parameters()` and `state_dict()` hold adapters only."""

    def __init__(self, base: nn.Module, found: Survey) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a child: the base is not the kit's to register, train or save
        self.found = found
        self.adapters = nn.ModuleDict()
        self.live = Live()
        self.merged_name: str | None = None
        self.spent = False
        self._order: dict[str, Adapter] = {}
        self.taps: dict[str, Tap] = {}
        self._plans = Plans()
        self._backup: dict[str, merging.Backup] = {}
        self.unproven: set[str] = {s.path for s in found.sites} if not found.proven else set()
        self._state = BareState.take(base)
        self._install()
        self.__dict__["forward"] = Forward(self)
        self.training = base.training

    # ---- attaching ---------------------------------------------------------------------------------------------

    def _install(self) -> None:
        base = self.base
        base.requires_grad_(False)
        self.taps[""] = tap("", base)  # below the boundary, which lays the route that a tap reads
        install(base, bounded, "_kitout", self)
        blocks = {b.path for b in self.found.blocks if b.whole}
        for path, module in list(base.named_modules()):
            # besides blocks, whatever else activation checkpointing runs again: a stage of blocks
            if path in blocks or (path and hasattr(type(module), "gradient_checkpointing")):
                module.__dict__["_kitout_live"] = self.live
                self.taps[path] = Tap(path, module)
                install(module, routed, "_kitout_tap", self.taps[path])

    def detach(self) -> nn.Module:
        """The model as it was before `attach`: classes, requires_grad and mode; returns it. The kit is spent."""
        if self.merged_name is not None:
            self.unmerge()
        self.live.lay(Bound(None))
        self.spent = True
        for path in self.taps:
            module = self.base.get_submodule(path)
            untap(module)
            module.__dict__.pop("_kitout_live", None)
        uninstall(self.base, "_kitout")
        self._state.restore(self.base)
        self.taps.clear()
        return self.base

    @property
    def base(self) -> nn.Module:
        """The frozen model."""
        model = self.__dict__["base"]
        assert isinstance(model, nn.Module)
        return model

    def sites(self, targets: str, layers: str = "all") -> list[Site]:
        """The sites a selection means: `kit.sites("attn.q", "last:2")`."""
        return select(self.found.sites, targets, layers)

    # ---- adapters ----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return list(self._order)

    def __contains__(self, name: object) -> bool:
        return name in self._order

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._order:
            raise UnknownAdapter(f"no adapter is called {name!r}: {suggest(name, self._order)}")
        return self._order[name]

    def add(
        self,
        name: str,
        method: Method,
        *,
        seed: int | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """A fresh adapter, left trainable and not worn. seed: of its initial values (None: the global generator).

        heads: modules that replace modules of the model, by path, while the adapter is worn. dtype: of its values;
        default fp32 over a floating base, whatever the base's own. Raises NameTaken, BadName, TargetError, MergeState.
        """
        self.check_attached()
        adapter = build(self, name, method, seed, heads or {}, dtype)
        self.enter(adapter)
        return adapter

    def check_attached(self) -> None:
        """Detached, if `detach` has been called."""
        if self.spent:
            raise Detached("this kit was detached from its model: attach(model) makes a new one")

    def check_unmerged(self, before: str) -> None:
        """MergeState, if an adapter is folded into the base now."""
        if self.merged_name is not None:
            raise MergeState(f"{self.merged_name!r} is merged into the base: unmerge() before {before}")

    def enter(self, adapter: Adapter) -> None:
        """Takes in an adapter that was built for this kit (by `add` or from a file)."""
        with self.live.lock:
            check_name(self, adapter.name)  # another thread may have taken the name meanwhile
            for path in {**adapter.locals, **adapter.notes, **dict.fromkeys(paths(adapter, self.found))}:
                self.tapped(path)
            self.adapters["@" + adapter.name.replace(".", "%2E")] = adapter
            adapter.train(self.training)
            self._order[adapter.name] = adapter
            keep_still(self)

    def tapped(self, path: str) -> Tap:
        """The tap of a module, installed on first use."""
        return self.taps.setdefault(path, tap(path, self.base.get_submodule(path)))

    def remove(self, name: str) -> None:
        """Forgets an adapter. Refused while it is merged or worn: here, in any `with`, or by the sticky route."""
        adapter = self[name]
        self.live.settle()
        self.check_unmerged("removing an adapter")
        here = name in names(self.live.route) or name in names(self.live.sticky[-1].route)
        if here or self.live.entered[name] > 0:
            raise RouteError(f"{name!r} is worn: use(None) or another route before remove({name!r})")
        with self.live.lock:
            self.live.forget(name)
            del self.adapters["@" + adapter.name.replace(".", "%2E")]
            del self._order[name]
            self._forget_plans(name)

    def _forget_plans(self, name: str) -> None:
        worn_now = self.live.bound.route
        self._plans.forget(name)
        if name in names(worn_now):
            self.live.lay(self.resolve())

    def strength(self, name: str, value: float) -> None:
        """y + value * (delta(x, y) - y) wherever the adapter acts; 1 is as trained, 0 is off."""
        adapter = self[name]
        if not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
            raise RouteError(f"strength must be a finite number, found {value!r}")
        self.check_unmerged("changing a strength")
        check_strength(adapter, float(value))
        with self.live.lock:
            adapter.strength = float(value)
            self._forget_plans(name)

    def train_only(self, *chosen: str) -> None:
        """Exactly these adapters require gradients."""
        picked = [self[n] for n in chosen]
        for adapter in self._order.values():
            adapter.requires_grad_(adapter in picked)
        keep_still(self)

    def count(self, name: str) -> Count:
        """Trainable and total values, percent of the base and bytes of one adapter."""
        return count(self[name], self.base)

    # ---- wearing -----------------------------------------------------------------------------------------------

    def use(self, what: object) -> Worn:
        """Wears a name, None, a Stack, a Mix, or a list with one of these per row, from now on.

        In a `with` statement the choice holds for this thread or task alone and ends with the block.
        """
        self.check_attached()
        wanted = route(what)
        check_known(self, wanted)
        self.check_unmerged(f"use({what!r})")
        choice = Choice(wanted)
        with self.live.lock:
            self.live.settle()
            self.live.pending[threading.get_ident()] = choice
            try:
                self.live.lay(self.resolve())
            except RouteError:
                del self.live.pending[threading.get_ident()]
                raise
        return Worn(self, choice)

    @property
    def worn(self) -> Route:
        """The route in force in this context; None while an adapter is merged, whatever is worn before and after."""
        return self.live.route if self.merged_name is None else None

    def resolve(self) -> Bound:
        """The compiled form of the route in force."""
        wanted = self.worn
        bound = self._plans.get(wanted)
        if bound is None:
            bound = bind(wanted, self._order, self.taps, self.found, self.live)
            self._plans.keep(bound)
        return bound

    def first_forward(self) -> AbstractContextManager[None]:
        """Around a forward: where attach could not prove that sites fire, the first worn forward does."""
        return Firing(self) if self.unproven else nullcontext()

    # ---- merging -----------------------------------------------------------------------------------------------

    def merge(self, *chosen: str) -> None:
        """Folds adapters, in this order, into the base's weights in place; `unmerge` puts the old bits back.

        Nothing is worn until then, in any thread.
        """
        self.check_attached()
        if self.merged_name is not None:
            raise MergeState(f"{self.merged_name!r} is merged already: unmerge() first")
        adapters = [self[n] for n in chosen]
        if not adapters:
            raise MergeState("merge() was given no adapter: merge('name')")
        with self.live.lock:
            self._backup = merging.merge(self.base, adapters, self.found.alive)
            self.merged_name = "+".join(chosen)
            self.live.lay(self.resolve())

    def unmerge(self) -> None:
        """The base's own weights again, bit for bit, wearing what it wore before."""
        if self.merged_name is None:
            raise MergeState("nothing is merged")
        with self.live.lock:
            merging.restore(self._backup)
            self._backup, self.merged_name = {}, None
            self.live.lay(self.resolve())

    def merged(self, *chosen: str, in_memory: bool = False) -> nn.Module:
        """An ordinary model with the adapters folded in and no trace of kitout; this kit and its base stay as they are.

        in_memory: the copy need not survive save_pretrained, so it may hold what its config cannot bring back.
        """
        self.check_unmerged(f"merged{chosen!r}")
        return merging.plain_copy(self, chosen, in_memory)

    # ---- files -------------------------------------------------------------------------------------------------

    def save(
        self, name: str, folder: str | PathLike[str], *, note: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        """Writes one adapter as safetensors and json into a new or empty folder, or replaces an adapter folder.

        resume: keep what only training needs (a prefix's encoder), which is folded away otherwise.
        """
        from kitout.files.store import save

        save(self, name, folder, note=note, resume=resume)

    def load(
        self, folder: str | PathLike[str], *, name: str | None = None, heads: Mapping[str, nn.Module] | None = None
    ) -> Adapter:
        """Adds the adapter a folder holds. Raises WrongBase or FileError and changes nothing if anything is off.

        heads: modules, by path, for heads whose class a file cannot describe; their values come from the folder.
        """
        from kitout.files.store import load

        return load(self, folder, name=name, heads=heads)

    # ---- being a module ----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Kit:
        """Training mode of base (its dropout) and adapters; `model.train()` and `model.eval()` do the same."""
        super().train(mode)
        train_base(self, mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kit:
        self.check_unmerged("moving or casting it")
        self.base._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.base.parameters() if p.is_floating_point())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.generate(*args, **kwargs)  # type: ignore[operator]

    def can_generate(self) -> bool:
        return bool(self.base.can_generate())  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        enable_checkpointing(self.base, *args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        disable_checkpointing(self.base)

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def __str__(self) -> str:
        from kitout.kit.show import show

        return show(self)

    __repr__ = __str__
