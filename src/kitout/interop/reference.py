"""A reference model for preference and reinforcement training: a view of a kit's base, and no second copy of it.

It runs in eval mode under a route of its own (the base alone, or an adapter that is not trained), whatever is active in
the kit and in whatever mode that trains. Its modules and its state are those it runs, so what a trainer does to its
reference (switch its dropout off, hash its values) reaches the base that both share. It knows no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.route import adapter_names, normalize_route
from kitout.runtime.delegation import ModelInterface, interface_class
from kitout.runtime.hooks.class_swap import original_class


def reference(kit: Kit, route: object = None) -> Reference:
    """A view of the kit's base with no adapter active: what `ref_model` of TRL's trainers takes.

    route: an adapter (or a Stack or Mix) that the reference runs under instead, such as the one that training began
    from under another name. ConfigError where its values are trained: a reference must not move.
    """
    names = kit.state.names_with_parts(adapter_names(normalize_route(route)))
    moving = [name for name in names if any(p.requires_grad for p in kit[name].parameters())]
    if moving:
        raise ConfigError(
            f"{moving[0]!r} requires a gradient, and a reference must not move: kit.train_only(...) with the adapters "
            "that are trained, before reference()"
        )
    return Reference(kit, route)


class Reference(ModelInterface, nn.Module):
    """A kit's base under a fixed route. Made by `reference`; always in eval mode."""

    def __init__(self, kit: Kit, route: object) -> None:
        super().__init__()
        self.__dict__["kit"], self.__dict__["state"] = kit, kit.state  # the kit is not the view's to register
        self.route = route
        self._modules["model"] = kit.base
        names = kit.state.names_with_parts(adapter_names(normalize_route(route)))
        self._modules["adapters"] = nn.ModuleDict({f"@{n}".replace(".", "%2E"): kit[n] for n in names})
        self.training = False
        self.__class__ = interface_class(type(self), original_class(kit.base))

    @property
    def kit(self) -> Kit:
        """The kit whose base this is."""
        return cast(Kit, self.__dict__["kit"])

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The route, and eval mode of all it runs; afterwards each module's own mode again."""
        with self.state.active.lock:
            training = [module for root in (self.base, self.kit) for module in root.modules() if module.training]
            try:
                for module in training:
                    module.training = False
                with self.kit.use(self.route):
                    yield
            finally:
                for module in training:
                    module.training = True

    def call_base(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_reference():
            return self.base(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_reference():
            return super().generate(*args, **kwargs)

    def _call_backbone(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_reference():
            return super()._call_backbone(*args, **kwargs)

    def get_output_embeddings(self) -> Any:
        with self._as_reference():
            return super().get_output_embeddings()

    def train(self, mode: bool = True) -> Reference:
        """Nothing: a reference is in eval mode, and its base is in the mode that the kit trains in."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reference:
        self.kit._apply(fn, recurse)  # moved or cast as one
        return self
