"""Makes timm importable where torchvision is not.

timm's models need torchvision for one isinstance check; its data pipeline, imported on the way, subclasses torchvision
transforms. The published torchvision wheels are CUDA builds that refuse to import beside a CPU build of torch, so the
tests lend timm empty classes for the length of its own import and take them away again: nothing else ever sees a false
torchvision (transformers asks for it by name). Where a real torchvision imports, that one is used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Meta(type):
    """In an empty class any name is its own value: enum members such as InterpolationMode.BICUBIC are asked for."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(ModuleType):
    """A module in which every public name is an empty class and every import below it succeeds."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Meta(name, (), {})


_NAMES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@contextmanager
def _lent() -> Iterator[None]:
    modules = {name: _Module(name) for name in _NAMES}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in _NAMES:
            sys.modules.pop(name, None)


def _torchvision_imports() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError):  # absent, or built for another torch
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


def import_timm() -> ModuleType:
    """timm, with the real torchvision where it works and with empty classes in its place where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # both decorate with torch.jit, which torch 2.13 deprecates
        if "timm" in sys.modules or _torchvision_imports():
            return importlib.import_module("timm")
        with _lent():
            return importlib.import_module("timm")
