"""The name under which a base can be found on another machine: what adapter.json, cards and PEFT files say of it.

A name of the hub or of a built-in model stays as it is; of a folder only the last component is kept: the rest is about
the machine that trained. A snapshot in the hub's cache has its hub name ("models--OWNER--NAME", as huggingface_hub
writes it). It reads no file of the base and decides nothing: the fingerprint decides whether a base is the right one.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

HUB_CACHE = re.compile(r"(?:^|[\\/])models--([^\\/]+?)(?:--([^\\/]+))?[\\/]snapshots[\\/][^\\/]+[\\/]*$")
HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def portable_name(name_or_path: str) -> str:
    """A hub or built-in name as it is; of a folder, its last component ("/home/me/models/tiny" -> "tiny")."""
    text = str(name_or_path).strip()
    if cached := HUB_CACHE.search(text):
        return "/".join(part for part in cached.groups() if part)
    if not text or (HUB_NAME.fullmatch(text) and not _exists(text)):
        return text
    if not _exists(text) and ("\\" in text or PureWindowsPath(text).drive):
        return PureWindowsPath(text).name
    path = Path(text)
    return path.name if path.name not in ("", "..", "~") else _resolved(path).name


def name_of_model(model: Any) -> str | None:
    """The name under which a loaded model is found elsewhere; None where nothing says it, or it was a folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name_without_folder(name) if isinstance(name, str) and name else None


def name_without_folder(name_or_path: str) -> str | None:
    """The name under which the hub, or the list of built-in models, has it; None for a folder of this machine."""
    text = str(name_or_path).strip()
    is_name = HUB_CACHE.search(text) or (HUB_NAME.fullmatch(text) and not _exists(text))
    return portable_name(text) if is_name else None


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, a zero character, no such home
        return False


def _resolved(path: Path) -> Path:
    """Of "." and "..": the folder they name now."""
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return path
