"""The public names: one table, equal to the registry and to the type stub, and light to import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import kitout
import kitout.methods
from kitout.method import REGISTRY

PACKAGE = Path(kitout.__file__).parent


def test_every_public_name_is_where_the_table_says() -> None:
    for name, module in kitout.PUBLIC_NAMES.items():
        value = getattr(importlib.import_module(module), name)
        assert getattr(kitout, name) is value
        assert getattr(value, "__module__", module) == module, f"{name} is defined in {value.__module__}"
    assert set(kitout.__all__) == {*kitout.PUBLIC_NAMES, *kitout.PUBLIC_MODULES}
    assert set(kitout.__all__) <= set(dir(kitout))


def test_every_method_of_ours_is_a_public_name() -> None:
    ours = {name for name, method in REGISTRY.items() if method.__module__.startswith("kitout.")}
    assert ours == {name for name, module in kitout.PUBLIC_NAMES.items() if module.startswith("kitout.methods.")}
    assert ours == set(kitout.methods.__all__)


def test_the_type_stub_holds_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {
        (alias.asname, node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert imported == {*kitout.PUBLIC_NAMES.items(), ("errors", "kitout")}


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(kitout, "NoSuchName")


def test_import_kitout_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, kitout; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
