"""The install command fits the installation that runs, and no message or page has one of its own."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from kitout import install_hint
from kitout.install_hint import suggest_install
from project import EXTRAS, ROOT

PACKAGE = ROOT / "src" / "kitout"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def own_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's pip is that of the environment."""
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).parent / name) if name == "pip" else None)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets up kitout in a folder like site-packages, with this record of where it came from."""

    def install(origin: Any) -> None:
        site = tmp_path / "site-packages"
        (site / "kitout").mkdir(parents=True)
        info = site / "kitout-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.4\nName: kitout\nVersion: 0.1.0\n")
        if origin is not None:
            (info / "direct_url.json").write_text(origin if isinstance(origin, str) else json.dumps(origin))
        monkeypatch.setattr(install_hint, "PACKAGE", site / "kitout")
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()

    return install


def test_from_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert suggest_install(extra="train") == f"pip install -e '{ROOT}[train]'"
    monkeypatch.chdir(ROOT)
    assert suggest_install(extra="train") == "pip install -e '.[train]'"
    assert suggest_install("torchao", "trl>=1") == "pip install torchao 'trl>=1'"


def test_from_a_wheel_while_it_is_there(installed: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "it's here" / "kitout-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"")
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert shlex.split(suggest_install(extra="eval")) == ["pip", "install", f"{wheel}[eval]"]
    wheel.unlink()
    assert suggest_install(extra="eval") == "pip install 'kitout[eval]'"


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        (None, "kitout[hub]"),
        ("{", "kitout[hub]"),
        ("[]", "kitout[hub]"),
        ({"url": "https://a.example/kitout.whl", "archive_info": {}}, "kitout[hub] @ https://a.example/kitout.whl"),
        (
            {"url": "https://a.example/k", "vcs_info": {"vcs": "git", "commit_id": "ab12", "requested_revision": "v1"}},
            "kitout[hub] @ git+https://a.example/k@v1",
        ),
        (
            {"url": "https://a.example/k", "vcs_info": {"vcs": "git", "commit_id": "ab12"}, "subdirectory": "py"},
            "kitout[hub] @ git+https://a.example/k@ab12#subdirectory=py",
        ),
    ],
)
def test_from_elsewhere(installed: Any, origin: Any, requirement: str) -> None:
    installed(origin)
    assert suggest_install(extra="hub") == f"pip install '{requirement}'"


def test_a_record_of_another_copy_says_nothing(installed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed({"url": "https://a.example/kitout.whl", "archive_info": {}})
    monkeypatch.setattr(install_hint, "PACKAGE", tmp_path / "other" / "kitout")
    assert suggest_install(extra="hub") == "pip install 'kitout[hub]'"


def test_a_pip_of_another_environment_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "pip" else None)
    assert suggest_install("x") == f"{sys.executable} -m pip install x"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert suggest_install("x") == f"uv pip install --python {sys.executable} x"


def test_no_message_has_a_command_of_its_own() -> None:
    own = re.compile(r"\b(pip3?|uv|conda) (install|add)\b|kitout\[")
    sources = [path for path in SOURCES if path.name != "install_hint.py"]
    found = [str(path.relative_to(PACKAGE)) for path in sources if own.search(path.read_text(encoding="utf-8"))]
    assert not found, "use install_hint.suggest_install"


def test_every_extra_that_a_message_names_exists() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    calls = [
        node
        for text in texts
        if "suggest_install(" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "suggest_install"
    ]
    asked = {word.value.value for call in calls for word in call.keywords if isinstance(word.value, ast.Constant)}
    assert asked >= {"data", "eval", "hub", "train"}
    assert asked <= set(EXTRAS)


def test_the_pages_install_from_the_clone() -> None:
    """No index has kitout, so `pip install kitout` and `'kitout[...]'` fail; the extras that are named exist."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(pip install|uv add)[^`\n]*\bkitout\b", text), page.name
        named = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", text) for extra in group.split(",")}
        assert named <= set(EXTRAS), page.name
