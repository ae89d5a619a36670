"""kitout: adapt a large frozen transformer, text or vision, by adding small trained parts.

The public names and nothing else. `attach(model)` gives a kit; methods (LoRA, IA3, ...) say what to add where; Stack
and Mix say how parts are worn together.
"""

import importlib
from typing import Any

from kitout import errors
from kitout.files.peft import load_peft, save_peft
from kitout.kit.attach import attach
from kitout.kit.delta import Delta
from kitout.kit.kit import Kit
from kitout.kit.method import Method, register
from kitout.kit.route import Mix, Stack
from kitout.methods import *  # noqa: F403 - the methods package decides what it exports
from kitout.methods import __all__ as _methods

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`kitout.train` is imported when it is first asked for: `import kitout` stays light."""
    if name == "train":
        return importlib.import_module("kitout.train")
    raise AttributeError(f"module 'kitout' has no attribute {name!r}")


__all__ = [  # noqa: PLE0604 - the methods package names its own
    "Delta",
    "Kit",
    "Method",
    "Mix",
    "Stack",
    "attach",
    "errors",
    "load_peft",
    "register",
    "save_peft",
    "train",  # noqa: F405 - by __getattr__ below
    *_methods,
]
