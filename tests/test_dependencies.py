"""What the code imports is what the package requires: the core alone starts, and the README's line is enough.

The imports are read with ast; one subprocess runs without every optional package. It knows no version.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kitout.assets.catalog import ASSETS
from project import EXTRAS, ROOT, requirements

PACKAGE = ROOT / "src" / "kitout"
# Import name -> the package that brings it, where the two differ.
PACKAGES = {"PIL": "pillow", "google": "onnx", "ruamel": "ruamel-yaml", "annotated_types": "pydantic"} | {
    "pydantic_core": "pydantic", "typing_extensions": "pydantic"
}  # fmt: skip
# Imported by those who have them, each behind a message or by the name of its module.
CHOSEN = {"timm", "torchao", "trl"}


def third_party(path: Path) -> Iterator[tuple[str, bool]]:
    """The packages a file imports, and whether importing the file is enough to need them."""
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
    for path in PACKAGE.rglob("*.py"):
        needed = {package for package, at_import in third_party(path) if at_import}
        assert needed <= core | ({"trl"} if path.name == "trl.py" else set()), path


def test_the_readmes_line_brings_what_its_commands_need() -> None:
    block = next(
        b for b in re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "pip install" in b
    )
    extras = re.findall(r"^pip install -e '\.\[([\w,]+)\]'", block, flags=re.MULTILINE)[0].split(",")
    brought = requirements(*extras)
    imported = {package for path in PACKAGE.rglob("*.py") for package, _ in third_party(path)}
    assert imported - CHOSEN - brought == {"datasets"}, "only data sets of the hub ask for more"
    assert {package for asset in ASSETS.values() for package in asset.needs} <= brought
    assert any(name in ASSETS for name in re.findall(r"--(?:model|data) ([\w-]+)", block)), "the example is built in"


WITHOUT_EXTRAS = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # neither found nor imported
from typer.testing import CliRunner
from kitout.cli import app
for line in {lines!r}:
    result = CliRunner().invoke(app, line.split())
    print(line, result.exit_code, result.exception.__class__.__name__, result.output, sep="|", end="|\\n")
"""


def test_the_core_alone_starts_and_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    optional = sorted(requirements(*EXTRAS) - requirements())
    blocked = ["PIL", *(name.replace("-", "_") for name in optional)]
    lines = ["--help", "assets list", f"train --model none --data {tmp_path / 'a.csv'}"]
    code = WITHOUT_EXTRAS.format(blocked=blocked, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = re.findall(r"^([\w /.-]+)\|(\d)\|(\w+)\|", done.stdout, flags=re.MULTILINE)
    assert [(line.split()[0], status) for line, status, _ in ends] == [("--help", "0"), ("assets", "0"), ("train", "1")]
    assert {name for *_, name in ends} <= {"NoneType", "SystemExit"}
    assert "accelerate, which is not installed" in done.stdout
    assert f"install -e '{ROOT}[train]'" in done.stdout
