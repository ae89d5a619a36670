"""Whether the record of an adapter fits this model: the base that it was made for, and its sites one by one.

A file lists where its adapter was, because the same settings may find other places in a model that only resembles its
own. It knows records and sites, and nothing of the adapter's tensors.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from kitout.base.select import COMPOSITE_ROLES
from kitout.base.site import Site
from kitout.errors import Errors, FileError, WrongBase
from kitout.files.adapter_json import AdapterJson, SiteEntry
from kitout.files.base_fingerprint import differences, fingerprint
from kitout.method import Method
from kitout.runtime.build_adapter import check_sites, select_sites
from kitout.runtime.state import KitState

MAX_SITE_ERRORS = 6


def check_base(state: KitState, folder_path: Path, record: AdapterJson) -> None:
    current = fingerprint(state, [s.path for s in record.sites], [h.path for h in record.heads])
    if not (current.valued and record.base.valued):
        which = "This base is" if not current.valued else f"The base {folder_path} was made for was"
        warnings.warn(
            f"{which} on the meta device: bases compared by keys and shapes only, not by values", stacklevel=4
        )
    errors = Errors(WrongBase, f"{folder_path} was made for another base")
    for message in differences(record.base, current):
        errors.add(message)
    errors.raise_if_any()


def find_sites_of(state: KitState, record: AdapterJson, method: Method) -> tuple[list[Site], dict[str, str]]:
    """The method's sites in this model, which must be those of the record one by one, and what it leaves out.

    Two kinds were selected when older files were written: routers, which all-linear leaves out now, and the sublayers
    that end at a path, which a path meant as well.
    """
    heads = [h.path for h in record.heads]
    sites, left_out = select_sites(state, method, heads, record.name)
    listed, paths = {entry.key for entry in record.sites} - {s.key for s in sites}, {s.path for s in sites}
    twins = [s for s in state.survey.sites if s.key in listed and s.role in COMPOSITE_ROLES and s.path in paths]
    routers = {s.key: s for s in state.survey.sites if s.is_router and s.key in listed}
    order = {s.key: i for i, s in enumerate(state.survey.sites)}
    sites = sorted([*sites, *routers.values()], key=lambda s: order.get(s.key, 0)) if routers else sites
    sites = [*sites, *twins]
    check_sites(record.name, sites, heads, method)
    old, new = {s.key: s for s in record.sites}, {s.key: SiteEntry.of(s) for s in sites}
    errors = Errors(FileError, f"its sites are not those that {record.method} finds in this model")
    if len(old) != len(record.sites):
        errors.add(f"it lists {len(record.sites)} sites, {len(old)} different ones")
    for key in [*old, *(k for k in new if k not in old)]:
        message = _site_error(key, old.get(key), new.get(key))
        if message:
            errors.add(message)
    errors.shorten(MAX_SITE_ERRORS, "sites")
    errors.raise_if_any()
    return sites, left_out


def _site_error(key: str, old: SiteEntry | None, new: SiteEntry | None) -> str | None:
    if old is None or new is None:
        return f"{key[:120]}: {'not in the file' if old is None else 'not found here'}"
    fields = ("path", "role", "port", "d_in", "d_out", "channels")
    changed = [f for f in fields if getattr(old, f) != getattr(new, f)]
    changes = [f"{f} was {str(getattr(old, f))[:60]}, here {str(getattr(new, f))[:60]}" for f in changed]
    return f"{key}: {'; '.join(changes)}" if changes else None
