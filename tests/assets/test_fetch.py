"""Only pinned wheels are accepted, and no member of one can write outside its folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from kitout.assets.catalog import Wheel
from kitout.assets.fetch import compute_sha256, extract, fetch_wheel, verify_wheel
from kitout.errors import AssetError


def make_wheel(path: Path, members: dict[str, bytes]) -> Wheel:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Wheel("toy", "1.0", path.name, compute_sha256(path), 0.001)


def test_a_wheel_in_the_cache_is_not_downloaded(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", {"toy/a.txt": b"hello"})
    messages: list[str] = []
    assert fetch_wheel(wheel, tmp_path, messages.append) == tmp_path / wheel.file
    assert messages == []


def test_a_wrong_hash_names_both_and_the_file(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", {"toy/a.txt": b"hello"})
    path = tmp_path / wheel.file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(AssetError) as error:
        verify_wheel(wheel, path)
    assert wheel.sha256 in str(error.value)
    assert compute_sha256(path) in str(error.value)
    assert str(path) in str(error.value)


def test_offline_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    wheel = Wheel("kitout-no-such-project", "1.0", "kitout_no_such_project-1.0-py3-none-any.whl", "0" * 64, 0.1)
    with pytest.raises(AssetError, match=r"could not download kitout-no-such-project==1\.0") as error:
        fetch_wheel(wheel, tmp_path / "wheels", lambda _: None)
    assert str(tmp_path / "wheels" / wheel.file) in str(error.value)
    assert [p.name for p in (tmp_path / "wheels").iterdir()] == []  # no half download stays


def test_without_pip_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitout.assets.fetch.importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="ensurepip"):
        fetch_wheel(Wheel("toy", "1.0", "toy-1.0-py3-none-any.whl", "0" * 64, 0.1), tmp_path, lambda _: None)


def test_members_are_written_under_their_last_name_inside_the_folder(tmp_path: Path) -> None:
    make_wheel(tmp_path / "w.whl", {"../../evil.txt": b"e", "/abs/other.txt": b"o"})
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    paths = extract(tmp_path / "w.whl", ["../../evil.txt", "/abs/other.txt"], out, max_member_bytes=100)
    assert paths == [out / "evil.txt", out / "other.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "w.whl"]


def test_all_errors_of_a_wheel_are_reported_together(tmp_path: Path) -> None:
    make_wheel(tmp_path / "w.whl", {"a/big.bin": b"0" * 1000, "a/..": b"up", "b/c\\d": b"windows"})
    with pytest.raises(AssetError) as error:
        extract(tmp_path / "w.whl", ["a/big.bin", "a/..", "b/c\\d", "a/missing"], tmp_path, max_member_bytes=100)
    for part in ("1,000 bytes", "'..'", "c\\\\d", "a/missing"):
        assert part in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.whl"]


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    make_wheel(tmp_path / "w.whl", {"a/x": b"1", "b/x": b"2"})
    with pytest.raises(AssetError, match="not one safe file name"):
        extract(tmp_path / "w.whl", ["a/x", "b/x"], tmp_path, max_member_bytes=100)


def test_a_file_that_is_not_a_zip_or_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(b"<html>error page</html>")
    with pytest.raises(AssetError, match="is not a wheel"):
        extract(tmp_path / "w.whl", ["a"], tmp_path, max_member_bytes=100)
    make_wheel(tmp_path / "d.whl", {"a/x": b"hello world" * 9})
    data = bytearray((tmp_path / "d.whl").read_bytes())
    with zipfile.ZipFile(tmp_path / "d.whl") as archive:
        at = archive.getinfo("a/x").header_offset
    at = data.index(b"PK\x01\x02", at)
    data[at + 16] ^= 0xFF  # the CRC in the directory
    (tmp_path / "d.whl").write_bytes(bytes(data))
    with pytest.raises(AssetError, match="damaged"):
        extract(tmp_path / "d.whl", ["a/x"], tmp_path, max_member_bytes=1000)
