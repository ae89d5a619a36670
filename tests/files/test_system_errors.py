"""What the system refuses on a path: a PathError of `save`, `load`, `save_peft` and `load_peft`; nothing is left."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import kitout
from kitout import LoRA
from kitout.errors import FileError, KitDetached
from kitout.files import atomic
from zoo import ZOO


@pytest.fixture(scope="module")
def kit() -> kitout.Kit:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", LoRA(rank=8, targets="all-linear"))
    return kit


Call = Callable[[kitout.Kit, Any], Any]
WRITERS: dict[str, Call] = {
    "save": lambda kit, folder: kit.save("a", folder),
    "save_peft": lambda kit, folder: kitout.save_peft(kit, "a", folder),
}
READERS: dict[str, Call] = {
    "load": lambda kit, folder: kit.load(folder, name="b"),
    "load_peft": lambda kit, folder: kitout.load_peft(kit, folder, "b"),
}
BOTH = WRITERS | READERS


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(call: Call, kit: kitout.Kit, folder: Any, *words: str) -> None:
    with pytest.raises(FileError) as caught:
        call(kit, folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 1200
    assert kit.names == ["a"]


@contextmanager
def full_disk(max_bytes: int = 4096) -> Iterator[None]:
    """No file of this process may grow beyond that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """The folder may be neither read nor written by this process, even where it is root's."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("~nouser/adapter", ("~nouser", "write the whole path")),
        ("x" * 300, ("too long", "shorter names")),
        ("/".join(["x" * 200] * 30), ("too long", "shorter names")),
        ("nul\0byte", ("zero character",)),
        ("half of a \ud800 pair", ("no path can have",)),
        (None, ("given by its path",)),
        (3, ("given by its path",)),
    ],
)  # fmt: skip
def test_what_is_no_path(name: str, folder: Any, words: tuple[str, ...], kit: kitout.Kit, tmp_path: Path) -> None:
    inside = f"{tmp_path}/{folder}" if isinstance(folder, str) and folder[0] != "~" else folder
    refused(BOTH[name], kit, inside, *words)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("inside", ["", "deeper", "deeper/still"])
def test_a_path_that_is_a_file(name: str, inside: str, kit: kitout.Kit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    refused(BOTH[name], kit, tmp_path / "file" / inside, str(tmp_path / "file"))
    assert everything(tmp_path) == {"file": b"dear"}


@pytest.mark.parametrize("name", BOTH)
def test_links_in_a_circle(name: str, kit: kitout.Kit, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    refused(BOTH[name], kit, tmp_path / "one", "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("name", READERS)
def test_a_folder_that_is_missing(name: str, kit: kitout.Kit, tmp_path: Path) -> None:
    refused(READERS[name], kit, tmp_path / "none", "there is no such folder")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_a_folder_without_permission(name: str, inside: str, kit: kitout.Kit, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    with no_permission(folder):
        refused(BOTH[name], kit, folder / inside, "Permission denied", "change its permissions")
    assert everything(folder) == {}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("folder", ["/proc/kitout/adapter", "/proc/self/adapter", "/dev/full", "/dev/null/adapter"])
def test_a_disk_that_takes_no_folders(name: str, folder: str, kit: kitout.Kit) -> None:
    refused(WRITERS[name], kit, folder, folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk(name: str, kit: kitout.Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", mkdir)
    refused(WRITERS[name], kit, tmp_path / "a" / "b", "Read-only file system", "can be written to")
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("max_bytes", [0, 100, 40_000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name: str, max_bytes: int, kit: kitout.Kit, tmp_path: Path) -> None:
    """Nothing begun is left, neither the parents of a new folder; an older adapter stays as it was."""
    with full_disk(max_bytes):
        refused(WRITERS[name], kit, tmp_path / "new" / "deeper" / "a", "cannot be written")
    assert everything(tmp_path) == {}
    WRITERS[name](kit, tmp_path / "a")
    before = everything(tmp_path)
    with full_disk(max_bytes), pytest.raises(OSError, match="cannot be written"):  # still what callers caught before
        WRITERS[name](kit, tmp_path / "a")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_when_it_is_flushed(
    name: str, kit: kitout.Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "flush", flush)
    refused(WRITERS[name], kit, tmp_path / "a" / "b", "No space left", "free some space")
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("metadata", [3, {1: "a"}, [("a", 1)]])
def test_metadata_that_is_no_dict_of_names(metadata: Any, kit: kitout.Kit, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="metadata cannot be written"):
        kit.save("a", tmp_path / "a", metadata=metadata)
    assert everything(tmp_path) == {}


def test_metadata_comes_back_as_json_has_it(kit: kitout.Kit, tmp_path: Path) -> None:
    """Keys and tuples inside become texts and lists before the digest is taken."""
    kit.save("a", tmp_path / "a", metadata={"runs": {2: (1, 2), 10: {"x": 0.1}}, "ü": "\ud800"})
    loaded = kitout.attach(ZOO["llama"].build()).load(tmp_path / "a")
    assert loaded.metadata == {"runs": {"2": [1, 2], "10": {"x": 0.1}}, "ü": "\ud800"}


@pytest.mark.parametrize("name", READERS)
def test_a_detached_kit_loads_nothing(name: str, tmp_path: Path) -> None:
    other = kitout.attach(ZOO["llama"].build())
    other.add("a", LoRA(), heads={"lm_head": nn.Linear(48, 7)})
    other.remove("a")
    other.detach()
    with pytest.raises(KitDetached):
        READERS[name](other, tmp_path)
