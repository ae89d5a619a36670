"""The store: an asset is whole or absent and made once, whatever killed or parallel processes do."""

from __future__ import annotations

import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest

from kitout.assets import store
from kitout.assets.catalog import ASSETS, GROUPS, Asset, Wheel
from kitout.assets.fetch import compute_sha256
from kitout.errors import AssetError


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """One asset in the catalog, its wheel already in the cache."""
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    with zipfile.ZipFile(wheels / "toy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/words.txt", "one two")
    wheel = Wheel("toy", "1.0", "toy-1.0-py3-none-any.whl", compute_sha256(wheels / "toy-1.0-py3-none-any.whl"), 0.001)

    def convert(raw: Path, out: Path) -> None:
        (out / "words").write_text((raw / "words.txt").read_text().upper())

    asset = Asset("toy", "text", "a toy", "MIT", "none", wheel, ("toy/words.txt",), convert)
    monkeypatch.setitem(ASSETS, "toy", asset)
    return asset


def quiet(_: str) -> None: ...


def replace(monkeypatch: pytest.MonkeyPatch, toy: Asset, **changes: object) -> None:
    monkeypatch.setitem(ASSETS, "toy", Asset(**(vars(toy) | changes)))  # type: ignore[arg-type]


def test_get_makes_the_folder_and_later_only_returns_it(toy: Asset) -> None:
    with pytest.raises(AssetError, match="kitout assets get toy"):
        store.asset_path("toy")
    path = store.fetch_asset("toy", quiet)
    assert (path / "words").read_text() == "ONE TWO"
    messages: list[str] = []
    assert store.fetch_asset("toy", messages.append) == path == store.asset_path("toy")
    assert messages == []
    assert not (store.cache_dir() / "wheels" / toy.wheel.file).exists()  # no other asset needs it


def test_a_file_cut_short_or_another_recipe_means_making_it_again(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(store.cache_dir() / "wheels" / toy.wheel.file, tmp_path / "kept.whl")
    path = store.fetch_asset("toy", quiet)
    (path / "words").write_text("ONE")
    assert not store.is_installed("toy")
    shutil.copy(tmp_path / "kept.whl", store.cache_dir() / "wheels" / toy.wheel.file)
    assert (store.fetch_asset("toy", quiet) / "words").read_text() == "ONE TWO"
    replace(monkeypatch, toy, recipe=2)
    assert not store.is_installed("toy")


def test_a_failed_conversion_leaves_nothing_and_the_wheel_stays(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(raw: Path, out: Path) -> None:
        (out / "half").write_text("half")
        raise KeyboardInterrupt

    replace(monkeypatch, toy, convert=breaks)
    with pytest.raises(KeyboardInterrupt):
        store.fetch_asset("toy", quiet)
    remaining = {p.name for p in (store.cache_dir() / "assets").iterdir() if not p.name.endswith(".lock")}
    assert remaining == set()
    assert (store.cache_dir() / "wheels" / toy.wheel.file).exists()
    monkeypatch.setitem(ASSETS, "toy", toy)
    assert (store.fetch_asset("toy", quiet) / "words").exists()


def test_the_work_folder_of_a_killed_process_is_removed(toy: Asset) -> None:
    stale = store.cache_dir() / "assets" / ".work-toy-99999"
    stale.mkdir(parents=True)
    (stale / "junk").write_text("x")
    store.fetch_asset("toy", quiet)
    assert not stale.exists()


def test_parallel_calls_make_it_once(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def slow(raw: Path, out: Path) -> None:
        runs.append(1)
        time.sleep(0.3)
        toy.convert(raw, out)

    replace(monkeypatch, toy, convert=slow)
    threads = [threading.Thread(target=store.fetch_asset, args=("toy", quiet)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == [1]
    assert store.is_installed("toy")


def test_a_wrong_wheel_installs_nothing(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, toy, wheel=Wheel("toy", "1.0", toy.wheel.file, "0" * 64, 0.001))
    with pytest.raises(AssetError, match="is not the pinned file"):
        store.fetch_asset("toy", quiet)
    assert not store.asset_folder("toy").exists()


def test_a_missing_package_is_named_before_anything_is_fetched(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, toy, needs=("kitout_no_such_package",))
    with pytest.raises(AssetError, match=" install kitout_no_such_package"):
        store.fetch_asset("toy", quiet)


def test_unknown_names_are_reported_together_with_suggestions() -> None:
    with pytest.raises(AssetError) as error:
        store.expand_names(["tweet", "boolq", "nothing-like-it"])
    assert "'tweets'" in str(error.value)
    assert "nothing-like-it" in str(error.value)
    assert store.expand_names(["demo", "tweets"]) == ["smollm2-135m", "tweets"]


def test_the_catalog_is_well_formed() -> None:
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
        assert re.fullmatch(r"[0-9a-f]{64}", asset.wheel.sha256)
        assert asset.wheel.file.startswith(f"{asset.wheel.project.replace('-', '_')}-{asset.wheel.version}-")
        assert asset.wheel.file.endswith("-none-any.whl")
        last = [member.rsplit("/", 1)[-1] for member in asset.members]
        assert len(set(last)) == len(last)
        assert asset.license
    assert {n for group in GROUPS.values() for n in group} <= set(ASSETS)


def test_the_cache_follows_its_variable_and_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path))
    assert store.cache_dir() == tmp_path
    monkeypatch.delenv("KITOUT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_dir() == tmp_path / "xdg" / "kitout"
