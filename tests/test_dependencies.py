"""What the code imports is what the package requires: the core alone starts, and the README's line is enough.

The imports are read with ast; one subprocess runs without every optional package. It knows no version.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kitout.assets.catalog import ASSETS
from kitout.install_hint import suggest_install
from project import EXTRAS, ROOT, requirements

PACKAGE = ROOT / "src" / "kitout"
# Import name -> the package that brings it, where the two differ.
PACKAGES = {"PIL": "pillow", "google": "onnx", "ruamel": "ruamel-yaml", "annotated_types": "pydantic"} | {
    "pydantic_core": "pydantic", "typing_extensions": "pydantic"
}  # fmt: skip
# Imported by those who have them, each behind a message or by the name of its module.
CHOSEN = {"peft", "timm", "torchao", "trl"}


@cache
def imported() -> dict[Path, set[tuple[str, bool]]]:
    """By file: the packages it imports, and whether importing the file is enough to need them."""
    return {path: set(_imported(path)) for path in PACKAGE.rglob("*.py")}


def _imported(path: Path) -> Iterator[tuple[str, bool]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for module in modules:
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names and name != "kitout":
                yield PACKAGES.get(name, name.replace("_", "-")), node in tree.body


def test_importing_any_file_needs_the_core_alone() -> None:
    core = requirements()
    for path, packages in imported().items():
        needed = {package for package, at_import in packages if at_import}
        assert needed <= core, path


def test_the_readmes_line_brings_what_its_commands_need() -> None:
    block = next(
        b for b in re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "pip install" in b
    )
    extras = re.findall(r"^pip install -e '\.\[([\w,]+)\]'", block, flags=re.MULTILINE)[0].split(",")
    brought = requirements(*extras)
    asked = {package for packages in imported().values() for package, _ in packages}
    assert asked - CHOSEN - brought == {"datasets", "lm-eval", "optuna", "ray", "reasoning-gym"}, (
        "only data sets of the hub, tasks of lm_eval, gym:NAME and kitout search ask for more"
    )
    assert {package for asset in ASSETS.values() for package in asset.needs} <= brought
    names = re.findall(r"--(?:model|data) ([\w-]+)", block)
    assert names
    assert set(names) <= set(ASSETS), "pasted as it is: no placeholders"
    assert "#" not in block, "zsh reads a comment as arguments"


WITHOUT_EXTRAS = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # neither found nor imported
import importlib
from typer.testing import CliRunner
from kitout.cli import app
for line in {lines!r}:
    result = CliRunner().invoke(app, line.split())
    print(line, result.exit_code, result.exception.__class__.__name__, result.output, sep="|", end="|\\n")
from kitout.errors import KitoutError
for module in ("kitout.interop.trl", "kitout.predict.image_inputs"):
    try:
        importlib.import_module(module)
    except KitoutError as error:
        print(error)
"""


def test_the_core_alone_starts_and_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    optional = sorted(requirements(*EXTRAS) - requirements())
    blocked = ["PIL", *(name.replace("-", "_") for name in optional)]
    lines = ["--help", "assets list", f"train --model none --data {tmp_path / 'a.csv'}"]
    code = WITHOUT_EXTRAS.format(blocked=blocked, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = re.findall(r"^([\w /.-]+)\|(\d)\|(\w+)\|", done.stdout, flags=re.MULTILINE)
    assert [(line.split()[0], status != "0") for line, status, _ in ends] == [
        ("--help", False), ("assets", False), ("train", True)
    ]  # fmt: skip
    assert {name for *_, name in ends} <= {"NoneType", "SystemExit"}
    assert "accelerate, which is not installed" in done.stdout
    assert re.search(r"needs TRL: .*\n  .*install 'trl>=", done.stdout)
    assert f"images need pillow, not installed here\n  {suggest_install(extra='data')}" in done.stdout
    assert suggest_install(extra="train") in done.stdout
