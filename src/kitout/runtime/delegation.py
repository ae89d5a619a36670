"""What clients ask of a model, answered by a kit: the plain list of what its base answers for it.

transformers.Trainer, TRL, accelerate, pipelines and evaluation harnesses read these names from the model they hold,
some of them from its class. So a kit's class has the name and forward signature of its base's class, and over a
transformers model it is a PreTrainedModel whose whole interface is the base's. It knows no method and no file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import nn

from kitout.errors import RouteError
from kitout.route import adapter_names
from kitout.runtime.base_state import disable_checkpointing, enable_checkpointing
from kitout.runtime.hooks.boundary import run_backbone
from kitout.runtime.state import KitState


class Delegated:
    """A name that the base answers, missing where the base has none; what is set goes to the base."""

    def __init__(self, base_class: type | None = None) -> None:
        self.base_class = base_class

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, kit: Any, owner: type | None = None) -> Any:
        if kit is None:
            return self if self.base_class is None else getattr(self.base_class, self.name, None)
        return getattr(kit.base, self.name)

    def __set__(self, kit: Any, value: object) -> None:
        setattr(kit.base, self.name, value)


class ModelInterface:
    """The names that a kit passes on to its base, whatever the base is."""

    # what it is
    config = Delegated()
    name_or_path = Delegated()
    main_input_name = Delegated()
    input_modalities = Delegated()
    output_modalities = Delegated()
    num_labels = Delegated()
    vocab_size = Delegated()
    model_tags = Delegated()
    add_model_tags = Delegated()
    hf_device_map = Delegated()
    get_memory_footprint = Delegated()
    # its loss
    accepts_loss_kwargs = Delegated()
    loss_type = Delegated()
    loss_function = Delegated()
    prepare_decoder_input_ids_from_labels = Delegated()
    # its embeddings and parts
    get_input_embeddings = Delegated()
    set_input_embeddings = Delegated()
    resize_token_embeddings = Delegated()
    tie_weights = Delegated()
    get_encoder = Delegated()
    get_decoder = Delegated()
    enable_input_require_grads = Delegated()
    disable_input_require_grads = Delegated()
    # generation
    generation_config = Delegated()
    generate = Delegated()
    generate_batch = Delegated()
    init_continuous_batching = Delegated()
    prepare_inputs_for_generation = Delegated()
    compute_transition_scores = Delegated()
    # activation checkpointing
    supports_gradient_checkpointing = Delegated()
    is_gradient_checkpointing = Delegated()
    is_activation_checkpointing = Delegated()

    @property
    def state(self) -> KitState:
        """What all the rest of kitout works on."""
        return cast(KitState, self.__dict__["state"])

    @property
    def base(self) -> nn.Module:
        """The frozen model."""
        return self.state.base

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype

    def can_generate(self) -> bool:
        """Whether the base generates; no for a base that does not know the question."""
        can_generate = getattr(self.base, "can_generate", None)
        return can_generate is not None and bool(can_generate())

    @property
    def base_model(self) -> Any:
        """The base without its head: called, it runs under the route in force, as the kit itself does."""
        backbone: Any = getattr(self.base, "base_model")  # noqa: B009 - nn.Module's own types know no such name
        return self if backbone is self.base else Backbone(backbone, self._call_backbone)

    def call_base(self, *args: Any, **kwargs: Any) -> Any:
        """The base's call."""
        return self.base(*args, **kwargs)

    def _call_backbone(self, *args: Any, **kwargs: Any) -> Any:
        return run_backbone(self.base, getattr(self.base, "base_model"), args, kwargs)  # noqa: B009

    def get_output_embeddings(self) -> Any:
        """The base's output head. RouteError where an active adapter acts there, which its weight does not show."""
        head: Any = getattr(self.base, "get_output_embeddings")()  # noqa: B009
        path = next((path for path, module in self.base.named_modules() if module is head), None)
        active = self.state.names_with_parts(adapter_names(self.state.route))
        names = [n for n in active if path in self.state[n].by_module]
        if names:
            raise RouteError(
                f"the active adapter {names[0]!r} acts at the output head {path}, and this caller reads the weight of "
                "the head (as TRL's trainers do for their loss), which the adapter is not part of: leave the head out "
                "of targets and heads, or train with transformers.Trainer or kitout.train, which run the model's own "
                "forward"
            )
        return head

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        enable_checkpointing(self.base, *args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        disable_checkpointing(self.base)

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def warnings_issued(self) -> dict[str, bool]:
        """Which warnings clients have shown for this model: the base's own record, else one of the kit's."""
        of_base = getattr(self.base, "warnings_issued", None)
        record: dict[str, bool] = self.__dict__.setdefault("_warnings_issued", {}) if of_base is None else of_base
        return record

    def _get_name(self) -> str:
        """The name of the base's class, by which Trainer chooses how labels are shifted."""
        return type(self.base).__name__


class Backbone:
    """A base without its head, under the route in force; every other attribute is the backbone's own."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def interface_class(kit_class: Any, base_class: Any) -> Any:
    """The class of the kits on one class of models: what clients read from a model's class is there.

    Its name and the signature of its `forward` are the base's. Of a PreTrainedModel's interface nothing runs on the
    kit itself: each name is the base's, except those that the kit has or that every nn.Module has.
    """
    return _build_class(kit_class, base_class)


@cache
def _build_class(kit_class: Any, base_class: Any) -> Any:
    @wraps(base_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call_base(*args, **kwargs)

    def reduce(self: Any, _protocol: int) -> tuple[Any, ...]:
        return _new_kit, (kit_class, base_class), self.__dict__

    members: dict[str, Any] = {
        "__module__": kit_class.__module__,
        "__qualname__": f"{kit_class.__qualname__}[{base_class.__name__}]",
        "__doc__": kit_class.__doc__,
        "__reduce_ex__": reduce,
        "forward": forward,
    }
    parents: tuple[type, ...] = (kit_class,)
    for parent in base_class.__mro__:
        if (parent.__module__, parent.__qualname__) == ("transformers.modeling_utils", "PreTrainedModel"):
            parents = (kit_class, parent)
            own = {name for c in kit_class.__mro__ if c not in (nn.Module, object) for name in vars(c)}
            names = {name for c in parent.__mro__ if c not in (nn.Module, object) for name in vars(c)}
            for name in sorted(name for name in names - own if not name.startswith("__")):
                is_module_s = hasattr(nn.Module, name)  # such as `to`, which kits have from nn.Module
                members[name] = inspect.getattr_static(nn.Module, name) if is_module_s else Delegated(base_class)
    return type(base_class.__name__, parents, members)


def _new_kit(kit_class: Any, base_class: Any) -> Any:
    cls = interface_class(kit_class, base_class)
    return cls.__new__(cls)
