"""What is kept comes back to the bit, from memory and from a file, within its limit; a damaged file is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kitout.trunk.feature_store import FeatureStore

BYTES = (5 * 8 + 6 * 4) * 4  # of one example below


def store(file: Path | None, *, limit: int = 10 * BYTES, memory: int = 0, keys: str = "abcd") -> FeatureStore:
    one = FeatureStore([(8, torch.float32), (4, torch.float32)], limit, memory, file)
    for key in keys:
        one.plan(key, (5, 6))
    one.use_file("same")
    return one


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 8, generator=generator), torch.randn(6, 4, generator=generator)]


def fill(one: FeatureStore, keys: str = "abcd") -> None:
    for key in keys:
        one.put(key, values(ord(key)))


def holds(one: FeatureStore, key: str) -> bool:
    found = one.get(key)
    return found is not None and all(torch.equal(*pair) for pair in zip(found, values(ord(key)), strict=True))


@pytest.mark.parametrize("memory", [0, 2 * BYTES, 10 * BYTES])
def test_memory_comes_first_then_the_file(tmp_path: Path, memory: int) -> None:
    file = tmp_path / "trunk.bin"
    one = store(file, memory=memory)
    assert not file.exists()  # before it is needed
    assert one.get("a") is None
    fill(one)
    assert all(holds(one, key) for key in "abcd")
    assert file.exists() == (memory < 4 * BYTES)
    assert sum(slot.number < 0 for slot in one.slots.values()) == min(4, memory // BYTES)
    one.close()
    assert not list(tmp_path.iterdir())


def test_no_more_is_kept_than_allowed(tmp_path: Path) -> None:
    one = store(tmp_path / "trunk.bin", limit=3 * BYTES, memory=BYTES, keys="aabcde")
    assert list(one.slots) == ["a", "b", "c"]
    assert one.num_left_out == 2
    assert one.memory_used == BYTES
    fill(one)
    assert [key for key in "abcde" if holds(one, key)] == ["a", "b", "c"]
    assert (tmp_path / "trunk.bin").stat().st_size < 3 * BYTES + 256
    without_file = store(None, memory=2 * BYTES)
    assert list(without_file.slots) == ["a", "b"]


def test_a_file_of_the_same_run_is_used_again_as_far_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "trunk.bin"
    fill(store(file), "abc")
    again = store(file)
    assert [key for key in "abcd" if holds(again, key)] == ["a", "b", "c"]
    with file.open("r+b") as opened:  # half of b was never written
        opened.seek(-2 * BYTES - BYTES // 2, 2)
        opened.write(b"\1" * 8)
    damaged = store(file)
    assert [key for key in "abcd" if holds(damaged, key)] == ["a", "c"]


@pytest.mark.parametrize("change", ["signature", "plan", "shorter", "header", "link"])
def test_a_file_of_something_else_is_made_anew(tmp_path: Path, change: str) -> None:
    file, other = tmp_path / "trunk.bin", tmp_path / "other"
    fill(store(file))
    if change == "shorter":
        file.write_bytes(file.read_bytes()[:-8])
    elif change == "header":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    elif change == "link":
        file.rename(other)
        file.symlink_to(other)
    one = store(file, keys="abc" if change == "plan" else "abcd")
    if change == "signature":
        one.use_file("another")
    assert [key for key in "abc" if one.get(key) is not None] == []
    fill(one, "ab")
    assert holds(one, "b")
    assert not file.is_symlink()


def test_a_full_disk_leaves_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kitout.trunk.feature_store._make", no_space)
    one = store(tmp_path / "trunk.bin", memory=2 * BYTES)
    fill(one)
    assert [key for key in "abcd" if holds(one, key)] == ["a", "b"]
    assert "No space left" in one.file_error
    assert one.num_left_out == 2


def test_each_entry_keeps_the_bits_of_its_dtype(tmp_path: Path) -> None:
    """An odd number of half-precision values stands before wider ones."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    stored = [torch.randn(5, 3, dtype=dtype) for dtype in dtypes]
    for memory in (0, 10**6):
        one = FeatureStore([(3, dtype) for dtype in dtypes], 10**6, memory, tmp_path / "trunk.bin")
        one.plan("a", [5, 5, 5])
        one.use_file("x")
        one.put("a", stored)
        found = one.get("a") or []
        assert [value.dtype for value in found] == list(dtypes)
        assert all(torch.equal(*pair) for pair in zip(found, stored, strict=True))
        one.close()
