"""The public names: one table, equal to the registry, the type stub and the pages, and light to import."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

import pytest

import kitout
import kitout.methods
from kitout.method import REGISTRY, register

PACKAGE = Path(kitout.__file__).parent
ROOT = Path(__file__).parents[1]


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


def test_registering_keeps_the_class_for_editors() -> None:
    """mypy looks through class decorators, pyright does not: LoRA was any Method to it, without a rank."""
    types = get_type_hints(register)
    assert types["return"] == types["cls"]
    assert isinstance(get_args(types["cls"])[0], TypeVar)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_is_described(name: str) -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    headings = ", ".join(re.findall(r"^## (.*)$", text, flags=re.MULTILINE)).split(", ")
    assert name in headings, f"docs/methods.md has no section on {name}"
    assert re.search(rf"^\| {name}\b.*\|$", text, flags=re.MULTILINE), f"docs/methods.md: no learning rate of {name}"
    assert f"\n| `{name}` |" in (ROOT / "README.md").read_text(encoding="utf-8"), f"README.md has no row for {name}"


def test_the_type_stub_holds_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {
        (alias.asname, node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname  # else a type that the stub needs
    }
    assert imported == {*kitout.PUBLIC_NAMES.items(), ("assess", "kitout"), ("errors", "kitout"), ("search", "kitout")}


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(kitout, "NoSuchName")


def test_import_kitout_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, kitout; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
