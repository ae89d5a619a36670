"""The kit: named adapters on one frozen base, activated, routed, counted, merged and saved.

`attach(model)` finds the sites, freezes the base and changes nothing else; the `Kit` then holds adapters and forwards
calls. This is the facade: what it does with tensors lives in `kitout.runtime`, files in `kitout.files`. It knows no
method and no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from kitout.base.find.find import find_sites as find_sites
from kitout.base.probe.probe import prove_sites
from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import AlreadyAttached, ConfigError, KitoutError, MergeStateError, RouteError
from kitout.files import adapter_folder
from kitout.files.pretrained_folder import save_pretrained
from kitout.method import Method, SiteStart
from kitout.route import Route, RouteEntry, Stack, adapter_names, normalize_route
from kitout.runtime.adapter import Adapter
from kitout.runtime.base_state import KitForward
from kitout.runtime.build_adapter import build_adapter, check_known, check_strength
from kitout.runtime.count import ParameterCount, count_all_parameters, count_parameters
from kitout.runtime.delegation import ModelInterface, interface_class
from kitout.runtime.graphs.compile_blocks import remove_graphs
from kitout.runtime.hooks.boundary import block_class, deepcopy_module, model_class
from kitout.runtime.hooks.class_swap import Hook, hook, original_class, restore_class, swap_class, unhook
from kitout.runtime.merge.commit import merge, restore
from kitout.runtime.merge.copy import plain_copy
from kitout.runtime.penalty import active_penalty, finish_loss
from kitout.runtime.routing.active import CompiledRoute
from kitout.runtime.routing.handle import Activated
from kitout.runtime.show import describe_kit
from kitout.runtime.state import KitState


def attach(
    model: nn.Module, *, roles: Mapping[str, str] | None = None, example_batch: Mapping[str, Any] | None = None
) -> Kit:
    """A kit on a transformers model, timm ViT or any nn.Module whose blocks can be found (or are given by `roles`).

    Freezes the model and changes nothing else. roles: regex on the module path -> role, where the finder needs help.
    example_batch: one batch as the model takes it, where a probe input cannot be made up from the model's config.
    Raises NoBlocksFound, TargetError, AlreadyAttached.
    """
    if not isinstance(model, nn.Module):
        raise KitoutError(f"attach() takes an nn.Module, found {type(model).__name__}")
    if isinstance(model, Kit):
        raise AlreadyAttached("this is a kit: attach() takes the model itself")
    if "_kitout" in model.__dict__:
        raise AlreadyAttached("this model has a kit attached: use that one, or kit.detach() first")
    attached = [path for path, m in model.named_modules() if "_kitout_hook" in m.__dict__ or "_kitout" in m.__dict__]
    if attached:
        raise AlreadyAttached(
            f"{attached[0] or 'this module'} belongs to a model with a kit attached: kit.detach() first"
        )
    return Kit(model, prove_sites(find_sites(model, roles), example_batch))


class Kit(ModelInterface, nn.Module):
    """Named adapters on one frozen base. Made by `attach`; `parameters()` and `state_dict()` hold adapters only."""

    def __init__(self, base: nn.Module, survey: Survey) -> None:
        super().__init__()
        state = KitState(base, survey)
        self.__dict__["state"] = state  # plain state: the base is not the kit's to register, train or save
        self.adapters = state.modules
        base.requires_grad_(False)
        state.hooks[""] = hook("", base)  # below the boundary, which installs the route that a hook reads
        swap_class(base, model_class, "_kitout", self)
        blocks = {b.path for b in survey.blocks if b.is_one_module}
        for path, module in list(base.named_modules()):
            # besides blocks, whatever else activation checkpointing runs again: a stage of blocks
            if path in blocks or (path and hasattr(type(module), "gradient_checkpointing")):
                module.__dict__["_kitout_active"] = state.active
                state.hooks[path] = Hook(path, module)
                swap_class(module, block_class, "_kitout_hook", state.hooks[path])
        self.__dict__["forward"] = KitForward(base, partial(finish_loss, state))
        self.training = state.modules.training = base.training
        self.__class__ = interface_class(type(self), original_class(base))

    def detach(self) -> nn.Module:
        """The model as it was before `attach`: classes, requires_grad and mode; returns it. The kit ends here."""
        state = self.state
        with state.active.lock:
            if state.merged_names:
                self.unmerge()
            state.active.install(CompiledRoute(None))
            state.is_detached = True
            remove_graphs(state)
            for path in state.hooks:
                module = self.base.get_submodule(path)
                unhook(module)
                module.__dict__.pop("_kitout_active", None)
            restore_class(self.base, "_kitout")
            state.before_attach.restore(self.base)
            state.hooks.clear()
        return self.base

    @property
    def survey(self) -> Survey:
        """The base's towers, blocks and sites."""
        return self.state.survey

    def sites(self, targets: str, layers: str = "all") -> list[Site]:
        """The sites a selection means: `kit.sites("attn.q", "last:2")`."""
        return select(self.survey.sites, targets, layers)

    # ---- adapters ----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return self.state.names

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __getitem__(self, name: str) -> Adapter:
        return self.state[name]

    def add(
        self,
        name: str,
        method: Method,
        *,
        seed: int | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        start: Mapping[str, SiteStart] | None = None,
    ) -> Adapter:
        """A new adapter, left trainable and not active. seed: of its initial values (None: the global generator).

        heads: modules that replace modules of the model, by path, while the adapter is active. dtype: of its values;
        default fp32 over a floating base, whatever the base's own. start: what `kitout.search.signals` found, for a
        method that starts from data. What a default or a group of `targets` selects and never runs is left out:
        `adapter.left_out` and `print(kit)` list it. Raises AdapterExists, InvalidAdapterName, TargetError,
        MergeStateError.
        """
        self.state.check_attached()
        adapter = build_adapter(self.state, name, method, seed, heads or {}, dtype, start)
        self.state.insert(adapter, check_usable=bool(adapter.method.part_names()))
        return adapter

    def remove(self, name: str) -> None:
        """Forgets an adapter. Refused while it is merged or active: here, in any `with`, or by the sticky route."""
        adapter = self[name]
        if name in self.state.merged_names:
            self.state.check_unmerged(f"removing {name!r}")
        self.state.discard(adapter.name)

    def strength(self, name: str, value: float) -> None:
        """y + value * (delta(x, y) - y) wherever the adapter acts; 1 is as trained, 0 is off."""
        adapter = self[name]
        if not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
            raise RouteError(f"strength must be a finite number, found {value!r}")
        self.state.check_unmerged("changing a strength")
        check_strength(adapter, float(value))
        with self.state.active.lock:
            adapter.strength = float(value)
            self.state.forget_routes(name)

    def train_only(self, *names: str) -> None:
        """Exactly these adapters require gradients."""
        selected = [self[n] for n in names]
        for adapter in self.state.adapters:
            adapter.requires_grad_(adapter in selected)
        self.state.refresh_base_mode()

    def penalty(self) -> Tensor | None:
        """What the active adapters add to a loss that is made of logits; None for nothing. One of labels has it."""
        return active_penalty(self.state)

    @overload
    def num_parameters(self, name: str) -> ParameterCount: ...
    @overload
    def num_parameters(
        self, name: None = None, *, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int: ...
    def num_parameters(
        self, name: str | None = None, *, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> ParameterCount | int:
        """With a name: a `ParameterCount` of that adapter (trainable, total, percent of the base, bytes).

        Without one: the number of parameters of base and adapters together, as transformers' own call of this name
        has it. only_trainable: those that require a gradient; exclude_embeddings: without the base's embeddings.
        """
        if name is None:
            return count_all_parameters(self.base, self.adapters, only_trainable, exclude_embeddings)
        if only_trainable or exclude_embeddings:
            raise ConfigError("num_parameters(name) counts everything of one adapter: it takes no options")
        return count_parameters(self[name], self.base)

    # ---- the route ---------------------------------------------------------------------------------------------

    def use(self, what: object) -> Activated[Kit]:
        """Activates a name, None, a Stack, a Mix, or a list with one of these per row, until the next `use`.

        In a `with` statement the choice holds for this thread or task alone and ends with the block. Tasks created
        inside, and asyncio.to_thread, have it too; a new threading.Thread or run_in_executor does not.
        """
        state = self.state
        state.check_attached()
        route = normalize_route(what)
        check_known(state, route)
        state.check_unmerged(f"use({what!r})")
        return Activated(self, state, route)

    @property
    def active(self) -> Route:
        """The route in force in this context; None while adapters are merged, whatever is active before and after."""
        self.state.active.make_sticky()
        return self.state.route

    # ---- merging -----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters folded into the base now, in order; () if none."""
        return self.state.merged_names

    def merge(self, *entries: RouteEntry) -> None:
        """Folds adapters, in this order, into the base's weights in place; `unmerge` puts the old bits back.

        Names, or a `Stack` or `Mix` of them as in `use`. No route is in force until then, in any thread.
        """
        state = self.state
        state.check_attached()
        if state.merged_names:
            raise MergeStateError(f"{state.merged_text} merged already: unmerge() first")
        entry = Stack(*entries) if entries else None
        check_known(state, entry)
        names = tuple(dict.fromkeys(adapter_names(entry)))
        if not names:
            raise MergeStateError("merge() was given no adapter: merge('name')")
        with state.active.lock:
            adapters = {name: self[name] for name in self.names}
            state.backups = merge(self.base, adapters, entry, state.survey)
            state.merged_names = names
            state.active.install(state.compiled_route())

    def unmerge(self) -> None:
        """The base's own weights again, bit for bit, under the route that was in force before."""
        state = self.state
        if not state.merged_names:
            raise MergeStateError("nothing is merged")
        with state.active.lock:
            restore(state.backups)
            state.backups, state.merged_names = {}, ()
            state.active.install(state.compiled_route())

    def merged_copy(self, *entries: RouteEntry, check_saveable: bool = True) -> nn.Module:
        """An ordinary model with the adapters folded in and no trace of kitout; this kit and its base stay as they are.

        entries: names in order, or a `Stack` or `Mix` of them; NotMergeable names what has no exact form in weights.
        check_saveable: raise NotMergeable where the copy would not survive save_pretrained; False for a copy that
        stays in memory, which may hold what its config cannot bring back.
        """
        self.state.check_unmerged(f"merged_copy({', '.join(map(repr, entries))})")
        entry = Stack(*entries) if entries else None
        check_known(self.state, entry)
        return plain_copy(self.state, entry, check_saveable)

    # ---- files -------------------------------------------------------------------------------------------------

    def save(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        keep_encoder: bool = False,
    ) -> None:
        """Writes one adapter as safetensors and json into a new or empty folder, or replaces an adapter folder.

        metadata: plain values kept in adapter.json. keep_encoder: keep what only training needs (a prefix's MLP
        encoder), which is folded away otherwise.
        """
        adapter_folder.save_adapter(self.state, name, folder, metadata=metadata, keep_encoder=keep_encoder)

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """What Trainer and other clients call: an adapter folder of what is in use, and the kit's state to resume from.

        Of one adapter that is active (else trainable): `folder` itself, which `load` reads; of several: a folder of
        each one's name in it. Other files of the folder stay. state_dict: the state, where it is gathered already.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False: kitout writes safetensors only")
        if is_main_process:
            save_pretrained(self.state, folder, self.state_dict() if state_dict is None else state_dict)

    def load(
        self,
        folder: str | PathLike[str],
        *,
        name: str | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        verify: bool = True,
    ) -> Adapter:
        """Adds the adapter a folder holds. Raises WrongBase or FileError and changes nothing if anything is off.

        heads: modules, by path, for heads whose class a file cannot describe; their values come from the folder.
        verify: False loads a folder that was edited after it was saved, without comparing its digests.
        """
        return adapter_folder.load_adapter(self.state, folder, name=name, heads=heads, verify=verify)

    # ---- being a module ----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Kit:
        """Training mode of base (its dropout) and adapters; `model.train()` and `model.eval()` do the same."""
        nn.Module.train(self, mode)
        self.state.set_base_mode(mode)
        return self

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """The adapters' modules, and the base's that hold no values: a walk that switches dropout off reaches those."""
        yield from super().modules(*args, **kwargs)
        yield from (m for m in self.base.modules(*args, **kwargs) if not (m._modules or m._parameters or m._buffers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kit:
        with self.state.active.lock:
            self.state.check_unmerged("moving or casting it")
            self.base._apply(fn, recurse)
            nn.Module._apply(self, fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Kit:
        with self.state.active.lock:
            return cast(Kit, deepcopy_module(self, memo))

    def __str__(self) -> str:
        return describe_kit(self.state)

    __repr__ = __str__
