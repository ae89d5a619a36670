"""What pyproject.toml declares, for tests: extras, requirements, metadata.

It resolves an extra that names others of the project and knows nothing of what is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> set[str]:
    """Names of the packages that kitout requires with these extras, in lower case with hyphens."""
    names: set[str] = set()
    pending = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    for line in pending:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line).groups()  # type: ignore[union-attr]
        if name == PROJECT["name"]:
            names |= requirements(*inner.split(","))
        else:
            names.add(re.sub(r"[-_.]+", "-", name).lower())
    return names
