"""Data sets on the Hugging Face hub by name: `owner/name`, `owner/name:config`, `owner/name#split`.

The `datasets` library does the work, and is imported only here; it runs no code of a data set. Classes that a set keeps
as numbers get their names back. It knows no format, no split of ours and no token.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kitout.data.read.tables import DataError, Row

_SOURCE_PATTERN = re.compile(r"(?P<name>[^:#]+)(:(?P<config>[^#]+))?(#((?P<first>\d+):)?(?P<last>\d+)|#(?P<split>.+))?")


@dataclass(frozen=True)
class HubTable:
    """One split. data: a `datasets.Dataset` or `IterableDataset`."""

    data: Any
    source: str
    split: str = ""

    def read_rows(self) -> list[Row]:
        found = list(self.iter_rows())
        if not found:
            raise DataError(f"{self.source} holds no rows")
        return found

    def iter_rows(self) -> Iterator[Row]:
        for number, row in enumerate(self.data, start=1):
            yield number, {name: self._with_class_names(name, value) for name, value in row.items()}

    def _with_class_names(self, column: str, value: Any) -> Any:
        names = self._class_names.get(column)
        if names is None or value is None:
            return value
        if isinstance(value, list):
            return [_class_name(names, one) for one in value]
        return _class_name(names, value)

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """The names of the classes of columns that hold their numbers, alone or in lists."""
        import datasets

        found = {}
        for column, kind in (self.data.features or {}).items():
            inner = kind.feature if isinstance(kind, datasets.List | datasets.LargeList) else kind
            if isinstance(inner, datasets.ClassLabel):
                found[column] = list(inner.names)
        return found


def open_hub_tables(source: str, split_named: Callable[[str], str], streaming: bool = False) -> list[HubTable]:
    """The splits of a set that name a part, or the one that is asked for. `#500`: the first 500 of each."""
    asked = _SOURCE_PATTERN.fullmatch(source)
    assert asked is not None  # the caller has seen that it looks like a name
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"there is no file or folder {source}, and data sets of the hub need the datasets library, "
            "not installed here\n  pip install 'kitout[hub]'"
        )
    found = _load_dataset(source, asked["name"], asked["config"], asked["split"], streaming)
    if asked["split"]:
        part = split_named(re.split(r"[\[+]", asked["split"])[0])
        return [HubTable(found, source, part)]
    first, last = int(asked["first"] or 0), int(asked["last"]) if asked["last"] else None
    name = source.partition("#")[0]
    tables = [
        HubTable(_slice_rows(data, first, last), f"{name}#{split}", split_named(str(split)))
        for split, data in found.items()
    ]
    parted = [t for t in tables if t.split]
    if not any(t.split == "train" for t in parted):
        splits = ", ".join(map(str, found))
        if len(tables) == 1:
            return [HubTable(tables[0].data, tables[0].source)]
        raise DataError(f"{name} has the splits {splits}; say which to learn from, e.g. {name}#{next(iter(found))}")
    return parted


def _load_dataset(source: str, name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as wrong:
        raise DataError(
            f"there is no file or folder {source}, and as a data set of the hub it does not load "
            f"({type(wrong).__name__}: {str(wrong)[:300]})"
        ) from wrong


def _slice_rows(data: Any, start: int, stop: int | None) -> Any:
    return data if stop is None else data.skip(start).take(stop - start)


def _class_name(names: Sequence[str] | Mapping[int, str], class_id: Any) -> Any:
    """-1 stands for a label that is kept secret: none."""
    return names[class_id] if isinstance(class_id, int) and 0 <= class_id < len(names) else None
