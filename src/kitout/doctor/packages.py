"""The packages kitout needs and those it can use: which are installed, in a version that fits, and do import.

What they are is read from the project file of a clone, else from the metadata of the installation, so that nothing is
listed twice. It knows no device and no cache.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from kitout.doctor.diagnosis import Diagnosis, Finding, OptionalPart
from kitout.format import single_line
from kitout.install_hint import find_checkout, suggest_install
from kitout.version import __version__

# The extras that users need, and what for; the others are for work on kitout itself.
PARTS = {
    "train": "all that kitout train meets",
    "data": "images, augmentation, parquet",
    "eval": "plots of the report, metrics of generated answers",
    "hub": "data sets by their name on the hub",
    "align": "tasks of reasoning-gym as prompts and rewards",
}
# Packages of others that kitout works with and never needs.
PEERS = {
    "peft": "export to PEFT is loaded again and compared",
    "trl": "kits as models of TRL's trainers",
    "timm": "vision models by their timm name",
    "bitsandbytes": "model.quantization=nf4 or int8",
    "torchao": "model.quantization=torchao-int8",
}


def _requirements(extra: str = "") -> Iterator[str]:
    """What kitout asks for, without an extra or in one; nothing where that is not known."""
    declared = _declared()
    for requirement in declared.get(extra, ()):
        nested = re.match(r"\s*kitout\s*\[([^\]]+)\]", requirement)
        if nested is None:
            yield requirement
            continue
        for name in nested[1].split(","):
            yield from _requirements(name.strip())


def _declared() -> Mapping[str, Sequence[str]]:
    """The requirements by extra; "": those of kitout itself.

    The metadata of a clone are as old as its installation, its project file is not.
    """
    checkout = find_checkout()
    if checkout is not None and sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    declared: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires("kitout") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
        declared.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return declared


def _name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found[0] if found else requirement


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_met(requirement: str) -> bool:
    """Whether a version that fits is installed."""
    version = _version_of(_name_of(requirement))
    try:
        from packaging.requirements import Requirement
    except ImportError:  # of a broken installation: then that it is there must do
        return bool(version)
    return bool(version) and Requirement(requirement).specifier.contains(version, prereleases=True)


def check_versions(result: Diagnosis) -> None:
    result.versions = {"kitout": __version__, "python": platform.python_version()}
    needed = list(dict.fromkeys(_requirements()))
    for requirement in needed or ("torch", "transformers"):
        name = _name_of(requirement)
        result.versions[name] = version = _version_of(name)
        if not _is_met(requirement):
            what = f"{requirement} is needed, {f'{version} is' if version else 'it is not'} installed"
            result.findings.append(Finding(what, suggest_install(requirement), is_needed=True))
    if not needed:
        result.findings.append(
            Finding(
                "kitout runs from a folder and is not installed, so what it needs is not known",
                suggest_install(extra="train"),
            )
        )


def check_imports(result: Diagnosis) -> None:
    """Installed packages that do not import: a library that is missing, a version built for another torch."""
    for module, names, is_needed in (
        ("torch", ("Tensor",), True),
        ("transformers", ("AutoModel", "PreTrainedModel", "AutoTokenizer"), True),
        ("torchvision", (), False),
        ("timm", (), False),
    ):
        if importlib.util.find_spec(module) is None:
            continue  # a needed one that is missing is a finding already
        try:
            loaded = importlib.import_module(module)
            for name in names:
                getattr(loaded, name)
        except Exception as error:  # whatever a broken installation raises
            text = single_line(f"{type(error).__name__}: {error}", 200)
            fix = suggest_install("--force-reinstall", module)
            if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != module:
                fix = suggest_install(error.name.partition(".")[0])
            elif not is_needed:
                fix = f"install the {module} that fits this torch, or remove it: transformers may load it"
            result.findings.append(Finding(f"{module} does not import ({text})", fix, is_needed))


def check_parts(result: Diagnosis) -> None:
    for name, purpose in PARTS.items():
        missing = tuple(dict.fromkeys(_name_of(r) for r in _requirements(name) if not _is_met(r)))
        result.parts.append(OptionalPart(name, purpose, missing, suggest_install(extra=name)))
    for name, purpose in PEERS.items():
        missing = () if _version_of(name) else (name,)
        result.parts.append(OptionalPart(name, purpose, missing, suggest_install(name)))
