"""The files around the package agree with it: citation, changelog, hooks, templates, pinned versions, targets, paths.

It reads them and runs nothing. It knows no page's content.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import kitout
from project import EXTRAS, PROJECT, ROOT, requirements

AROUND = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {target for line in re.findall(r"^([a-z- ]+):", MAKEFILE, flags=re.MULTILINE) for target in line.split()}


def read_yaml(path: Path) -> dict[str, Any]:
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(fields, dict), path
    return fields


def test_the_citation_is_of_this_version() -> None:
    fields = read_yaml(ROOT / "CITATION.cff")
    assert fields["cff-version"] == "1.2.0"
    assert (fields["version"], fields["license"]) == (kitout.__version__, PROJECT["license"])
    assert fields["authors"]
    assert {"message", "title"} <= set(fields)


def test_the_changelog_opens_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == kitout.__version__


def test_the_hooks_are_the_checks_of_make() -> None:
    (repository,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "nothing is downloaded, and versions are pinned in one place"
    hooks = {hook["entry"].removesuffix(" --force-exclude").removeprefix(".venv/bin/") for hook in repository["hooks"]}
    lines = {
        line.rstrip(" .") for line in re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy)\b.*)$", MAKEFILE, flags=re.MULTILINE)
    }
    assert hooks == {line for line in lines if "fix" not in line and line != "ruff format"}


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_the_issue_templates_are_forms(name: str) -> None:
    form = read_yaml(ROOT / ".github" / "ISSUE_TEMPLATE" / name)
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"]


def test_contributing_fits_on_one_screen() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 45


@pytest.mark.parametrize("page", AROUND, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = [path for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if not path.startswith(".venv")]
    missing = [path for path in paths if not any((root / path).exists() for root in (ROOT, ROOT / "src" / "kitout"))]
    assert not missing


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_a_target_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(named) <= TARGETS


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if not line.startswith("#")]
    assert pinned == sorted(pinned), "in order"
    assert len(pinned) == len(set(pinned))
    assert requirements(*EXTRAS) - set(pinned) == {"torch"}, "which build of torch is its owner's choice"


def test_one_place_names_the_host() -> None:
    (host,) = {url.split("/")[2] for url in PROJECT["urls"].values()}
    files = [ROOT / "CITATION.cff", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.*")]
    assert not [file.name for file in files if host in file.read_text(encoding="utf-8")]
