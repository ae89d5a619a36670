"""The command that installs what is missing, for the installation that runs: every message that names one asks here.

kitout may run from a clone, from a wheel, an archive or a repository by its address, or from an index; `kitout[train]`
by name fits only the last. It reads where the package lies and what pip recorded (direct_url.json, PEP 610), imports
nothing of kitout, and knows no extra by name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

PACKAGE = Path(__file__).resolve().parent
DISTRIBUTION = "kitout"


def suggest_install(*packages: str, extra: str = "") -> str:
    """A line for a shell that installs these packages, or this extra of kitout, into the running environment."""
    requirement = _extra_requirement(extra) if extra else []
    return " ".join([_installer(), *map(_quote, [*requirement, *packages])])


def _extra_requirement(extra: str) -> list[str]:
    """What pip is given to add an extra to this installation."""
    checkout = find_checkout()
    if checkout is not None:
        folder = "." if checkout.samefile(".") else str(checkout)
        return ["-e", f"{folder}[{extra}]"]
    origin = _read_origin()
    url = str(origin.get("url", ""))
    if url.startswith("file:"):
        path = url2pathname(urlsplit(url).path)
        if Path(path).exists():
            return [f"{path}[{extra}]"]
    elif url:
        return [f"{DISTRIBUTION}[{extra}] @ {_direct_reference(url, origin)}"]
    return [f"{DISTRIBUTION}[{extra}]"]  # pip takes the extra from the installed version, where there is an index too


def find_checkout() -> Path | None:
    """The clone that this file lies in; None: it lies in site-packages."""
    root = PACKAGE.parent.parent
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return root if PACKAGE.parent.name == "src" and f'name = "{DISTRIBUTION}"' in project else None


def _read_origin() -> dict[str, Any]:
    """pip's record of where the running package came from; empty: from an index, or nobody recorded it."""
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION):
        if Path(str(distribution.locate_file(PACKAGE.name))).resolve() != PACKAGE:
            continue  # another copy in this environment
        try:
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        except ValueError:
            return {}
        return origin if isinstance(origin, dict) else {}
    return {}


def _direct_reference(url: str, origin: dict[str, Any]) -> str:
    """A recorded address as pip takes it back: `git+https://host/name@commit#subdirectory=python`."""
    version_control = origin.get("vcs_info") or {}
    if version_control:
        revision = version_control.get("requested_revision") or version_control.get("commit_id")
        url = f"{version_control.get('vcs', 'git')}+{url}" + (f"@{revision}" if revision else "")
    return url + (f"#subdirectory={origin['subdirectory']}" if origin.get("subdirectory") else "")


def _installer() -> str:
    """`pip install` where the shell's pip is this environment's own, else a longer form that reaches it."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {_quote(sys.executable)}"
    found = shutil.which("pip")
    if found and Path(found).parent.resolve() == Path(sys.executable).parent.resolve():
        return "pip install"
    return f"{_quote(sys.executable)} -m pip install"


def _quote(word: str) -> str:
    """As one word of the shell; brackets mean something to zsh, and cmd.exe knows double quotes only."""
    if os.name == "nt":
        return f'"{word}"' if any(c in word for c in ' []&<>@"') else word
    return shlex.quote(word)
