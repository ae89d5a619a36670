"""The wheel and the sdist, built as `make package` builds them: complete, reproducible, installable, and typed.

Everything runs in folders of its own, without a network: the fresh environments see the packages that are installed
here, and of kitout only what was built. It knows nothing of what kitout does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import kitout
from project import EXTRAS, PROJECT, ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("build", reason="make setup installs it")
pytest.importorskip("hatchling", reason="make setup installs it")

# What a stranger writes; each line of `WRONG` must be an error on its own line.
USER = """
from pathlib import Path
import torch
from torch import nn
from typing_extensions import assert_type
import kitout
from kitout import IA3, LoRA, Mix, Stack, errors
from kitout.runtime.adapter import Adapter
from kitout.train.run import Result

model: nn.Module = nn.Linear(2, 2)
kit = kitout.attach(model)
assert_type(kit, kitout.Kit)
assert_type(kit.add("a", LoRA(rank=8, alpha=16, targets="attn.q attn.v"), seed=0), Adapter)
assert_type(kit.load(Path("out"), name="b"), Adapter)
assert_type(kit.merged_copy(Mix({"a": 0.7, "b": 0.3})), nn.Module)
with kit.use(["a", None, Stack("a", "b")]) as same:
    assert_type(same, kitout.Kit)
    loss: torch.Tensor = kit(torch.ones(1, 2)).loss
assert_type(kitout.train(model={"name": "m"}, data={"train": "a.csv"}, dry_run=True), Result)
assert_type(kitout.load_peft(kit, "out", "c"), Adapter)
assert_type(kitout.__version__, str)
try:
    kit.use("d")
except errors.UnknownAdapter as error:
    assert_type(error, errors.UnknownAdapter)
"""
WRONG = """
LoRA(rank="8")
LoRA(rnk=8)
kit.add(1, IA3())
kit.no_such_name()
kitout.no_such_name
kitout.train(1)
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)


def build(out: Path, *options: str) -> Path:
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, ROOT, cwd=out.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    return build(tmp_path_factory.mktemp("package") / "dist")


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    (path,) = built.glob("*.tar.gz")
    return path


def environment(folder: Path, package: Path) -> Path:
    """The python of a fresh environment with this one's packages and kitout from this file."""
    python = folder / "bin" / "python"
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(packages) + "\n")  # read as paths: their own .pth files are not
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=folder)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("wheel") / "venv", wheel)


def test_the_sdist_holds_the_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {""}
    assert {"PKG-INFO", "LICENSE", "Makefile", "constraints.txt", "tests/conftest.py", "CHANGELOG.md"} <= names
    done = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if done.returncode == 0:  # not in a git repository: the sdist, unpacked
        assert names - {"PKG-INFO"} == {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_the_package_and_its_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = ROOT / "src"
    package = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    info = f"kitout-{kitout.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == package
    assert {"kitout/py.typed", "kitout/__init__.pyi", f"{info}/licenses/LICENSE"} <= names


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_metadata_is_complete(wheel: Path) -> None:
    fields = metadata(wheel)
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == (
        "kitout",
        kitout.__version__,
        "Apache-2.0",
    )
    assert set(fields.get_all("Provides-Extra", [])) == set(EXTRAS)
    urls = dict(line.split(", ", 1) for line in fields.get_all("Project-URL", []))
    assert urls == PROJECT["urls"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= set(urls)
    assert "Typing :: Typed" in fields.get_all("Classifier", [])


def test_building_again_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """The wheel straight from the tree, too: the sdist lacks nothing."""
    again = build(tmp_path / "dist", "--wheel", "--sdist")
    assert {
        path.name: path.read_bytes() == (built / path.name).read_bytes() for path in again.iterdir()
    } == dict.fromkeys((path.name for path in built.iterdir()), True)


def test_the_installed_wheel_runs(python: Path, wheel: Path, tmp_path: Path) -> None:
    code = "import kitout; from kitout.install_hint import suggest_install as s; print(kitout.__file__, s(extra='hub'))"
    done = run(python, "-c", code, cwd=tmp_path)
    file, hint = done.stdout.split(maxsplit=1)
    assert Path(file).is_relative_to(python.parents[1]), done.stderr
    assert hint.strip().endswith(f"-m pip install '{wheel}[hub]'")
    done = run(python.with_name("kitout"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kitout train" in done.stdout


def test_the_sdist_installs(sdist: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", sdist)
    done = run(python, "-c", "import kitout; print(kitout.__version__, kitout.__file__)", cwd=tmp_path)
    version, file = done.stdout.split()
    assert version == kitout.__version__
    assert Path(file).is_relative_to(tmp_path)


def test_a_type_checker_reads_the_installed_package(python: Path, tmp_path: Path) -> None:
    """py.typed and the stub are in the wheel: no missing stubs, typed names, and wrong calls are found."""
    (tmp_path / "user.py").write_text(USER + WRONG)
    options = ["--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache", "--no-error-summary"]
    done = run(sys.executable, "-m", "mypy", *options, "user.py", cwd=tmp_path)
    found = [int(line) for line in re.findall(r"^user\.py:(\d+): error: ", done.stdout, flags=re.MULTILINE)]
    first = len(USER.splitlines()) + 2
    assert found == list(range(first, first + len(WRONG.split("\n")) - 2)), done.stdout + done.stderr
    assert "stubs" not in done.stdout
    assert "py.typed" not in done.stdout
