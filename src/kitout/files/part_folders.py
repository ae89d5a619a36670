"""The parts of a composition in its folder: parts/<name>/ for each adapter that it is made of, once, with digests.

A part is an adapter folder like any. The composition's record has the digest of each of its own parts, over what the
part computes (method, settings, strength, tensors, its own parts), not over how it was written. A load takes a part
from the kit where that is the same, from the folder where the kit has none, and refuses another one under its name. It
knows folders and digests, and neither how an adapter is written nor what a composition makes of its parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kitout.errors import AdapterExists, FileError
from kitout.files.adapter_json import RECORD, AdapterJson
from kitout.files.adapter_tensors import stored_tensors
from kitout.files.atomic import check_replaceable
from kitout.runtime.adapter import Adapter
from kitout.runtime.state import KitState

PARTS = "parts"  # the folder of the parts
LoadPart = Callable[[Path, str, tuple[str, ...]], Adapter]


def part_names(state: KitState, adapter: Adapter) -> list[str]:
    """Every adapter that a composition needs, parts of parts included; each comes after its own parts."""
    return state.names_with_parts(adapter.method.part_names())[::-1]


def part_digests(state: KitState, adapter: Adapter, keep_encoder: bool) -> dict[str, str] | None:
    """Name -> digest of an adapter's own parts; None where it has none."""
    names = adapter.method.part_names()
    if not names:
        return None
    return {name: content_digest(state, _form(state, name, keep_encoder), keep_encoder) for name in names}


def _form(state: KitState, name: str, keep_encoder: bool) -> Adapter:
    return state[name] if keep_encoder else state[name].inference_form()


def content_digest(state: KitState, adapter: Adapter, keep_encoder: bool) -> str:
    """sha256 of what an adapter computes: the same for the same adapter saved and loaded, whatever its name."""
    what = {
        "method": type(adapter.method).__name__,
        "settings": adapter.method.model_dump(mode="json"),
        "strength": adapter.strength,
        "heads": sorted(adapter.heads),
        "parts": part_digests(state, adapter, keep_encoder),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for name, tensor in sorted(stored_tensors(state, adapter).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def check_parts_replaceable(target: Path, files: Sequence[str]) -> None:
    """FileError where the folder of parts in `target` holds anything but adapter folders, which would be deleted."""
    folder = target / PARTS
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            check_replaceable(path, files)


def load_parts(
    state: KitState,
    folder: Path,
    record: AdapterJson,
    names: Sequence[str],
    load_part: LoadPart,
    chain: tuple[str, ...],
    verify: bool,
) -> list[str]:
    """Makes sure that the kit has the parts that a record was written with; the names of those that it did not have.

    chain: the adapters that are being loaded, from the outermost to this one. AdapterExists where the kit has another
    adapter under the name of a part, FileError where a part is missing or was exchanged.
    """
    expected = record.parts or {}
    if set(expected) != set(names):
        raise FileError(
            f"{folder}: {RECORD} has digests of the parts {sorted(expected)}, its settings name {sorted(set(names))}"
        )
    is_part = folder.parent.name == PARTS and not (folder / PARTS).is_dir()  # then they lie beside it
    root = folder.parent if is_part else folder / PARTS
    added: list[str] = []
    try:
        for name, digest in expected.items():
            if name in chain:
                raise FileError(f"{folder}: {name!r} is a part of itself, by way of {' > '.join(map(repr, chain))}")
            if name in state:
                if not _is_same(state, name, digest):
                    raise AdapterExists(
                        f"{folder} needs its own {name!r}, and this kit has another adapter of that name: remove or "
                        "rename one of them (a strength counts too), or load it into another kit"
                    )
                continue
            if not (root / name / RECORD).is_file():
                raise FileError(f"{folder}: its part {name!r} is missing: there is no adapter folder {root / name}")
            known = set(state.names)
            load_part(root / name, name, chain)
            added += [each for each in state.names if each not in known]
            if verify and not _is_same(state, name, digest):
                raise FileError(
                    f"{root / name} is not the part that {folder} was saved with: it was exchanged or edited; copy the "
                    "whole folder again"
                )
    except BaseException:
        discard_parts(state, added)
        raise
    return added


def are_same(state: KitState, name: str, other: str) -> bool:
    """Two adapters of a kit compute the same, in the form that files have without encoders."""
    first, second = (content_digest(state, _form(state, each, False), False) for each in (name, other))
    return first == second


def _is_same(state: KitState, name: str, digest: str) -> bool:
    return digest in (content_digest(state, _form(state, name, keep), keep) for keep in (False, True))


def discard_parts(state: KitState, names: Sequence[str]) -> None:
    """Takes parts out of the kit again, those first that the others are parts of."""
    for name in reversed(names):
        if name in state:
            state.discard(name)
