"""The hook: how code comes to run at a frozen module without editing it.

A hooked module's class is swapped for a dynamic subclass of the same name, so `isinstance`, keys, torch's hooks and
bits are those of the base; off, it costs one attribute read. The swapped forward reads one plain attribute (the
program of the current route). It knows nothing of adapters or rows. FSDP2 swaps classes the same way and may stack
its own on ours; `unhook` removes only ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol

from torch import Tensor, nn

ForwardFn = Callable[..., Any]
ClassSwap = Callable[[Any], type[nn.Module]]  # module class -> swapped subclass of it


class Program(Protocol):
    """What a hooked module does under the current route."""

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class _NoHook:
    """The hook of a module of a swapped class in no kit: `type(model)(config)` makes such."""

    program = None
    graphs = None


NO_HOOK = _NoHook()


class Hook:
    """The mutable spot on a hooked module: `program` is None while no adapter is active there."""

    __slots__ = ("graphs", "module", "path", "program")

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.program: Program | None = None
        self.graphs: Program | None = None  # of a block that is compiled: what runs it with its program


@cache
def hooked_class(base: type[nn.Module]) -> type[nn.Module]:
    """The swapped subclass of a module class."""
    frozen_forward = base.forward

    @wraps(frozen_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        program = self._kitout_hook.program
        if program is None:
            return frozen_forward(self, *args, **kwargs)
        return program(self, frozen_forward, args, kwargs)

    return same_named_subclass(base, {"forward": forward, "frozen_forward": frozen_forward, "_kitout_hook": NO_HOOK})


def same_named_subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass that goes by the base's name and whose instances pickle and deepcopy.

    swap: the function that makes this subclass. `__reduce_ex__` goes back to the untouched class and swaps again,
    because pickle would look the subclass up by name and find another.
    """
    swaps = (*base.__dict__.get("kitout_swaps", ()), members.pop("swap", hooked_class))
    root = base.__dict__.get("kitout_root", base)

    def reduce(self: Any, _protocol: int) -> tuple[Any, ...]:
        return _new_instance, (swaps, root), self.__dict__

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    marks = {"kitout_base": base, "kitout_root": root, "kitout_swaps": swaps}
    return type(base.__name__, (base,), {**names, **members, **marks, "__reduce_ex__": reduce})


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was before any hook."""
    cls: type[nn.Module] = type(module).__dict__.get("kitout_root", type(module))
    return cls


def _new_instance(swaps: tuple[ClassSwap, ...], cls: type[nn.Module]) -> nn.Module:
    for swap in swaps:
        cls = swap(cls)
    return cls.__new__(cls)


def swap_class(module: nn.Module, swap: ClassSwap, name: str, value: object) -> None:
    """Swaps the module's class and leaves `value` under a plain attribute."""
    module.__dict__[name] = value
    module.__class__ = swap(type(module))


def restore_class(module: nn.Module, name: str) -> None:
    """Takes our class out of the module's class, wherever others have stacked theirs since."""
    module.__dict__.pop(name, None)
    module.__class__ = _unswapped(type(module))


def _unswapped(cls: type) -> type:
    if "kitout_base" in cls.__dict__:
        base: type = cls.__dict__["kitout_base"]
        return base
    if not any("kitout_base" in c.__dict__ for c in cls.__mro__):
        return cls
    bases = tuple(_unswapped(b) for b in cls.__bases__)
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, members)


def hook(path: str, module: nn.Module) -> Hook:
    """The module's hook, installed on first use."""
    existing = module.__dict__.get("_kitout_hook")
    if existing is None:
        existing = Hook(path, module)
        swap_class(module, hooked_class, "_kitout_hook", existing)
    assert isinstance(existing, Hook)
    return existing


def unhook(module: nn.Module) -> None:
    restore_class(module, "_kitout_hook")


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The value a module is called with: its first argument, positional or not."""
    value = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
    assert isinstance(value, Tensor)
    return value


def replace_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its first tensor exchanged for x."""
    if args:
        return (x, *args[1:]), kwargs
    name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, name: x}
