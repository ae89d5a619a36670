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

_NAME = re.compile(r"(?P<name>[^:#]+)(:(?P<config>[^#]+))?(#((?P<first>\d+):)?(?P<last>\d+)|#(?P<split>.+))?")


@dataclass(frozen=True)
class HubTable:
    """One split. data: a `datasets.Dataset` or `IterableDataset`."""

    data: Any
    where: str
    part: str = ""

    def rows(self) -> list[Row]:
        found = list(self.each())
        if not found:
            raise DataError(f"{self.where} holds no rows")
        return found

    def each(self) -> Iterator[Row]:
        for number, row in enumerate(self.data, start=1):
            yield number, {name: self._worded(name, value) for name, value in row.items()}

    def _worded(self, column: str, value: Any) -> Any:
        names = self._classes.get(column)
        if names is None or value is None:
            return value
        if isinstance(value, list):
            return [_class(names, one) for one in value]
        return _class(names, value)

    @cached_property
    def _classes(self) -> dict[str, list[str]]:
        """The names of the classes of columns that hold their numbers, alone or in lists."""
        import datasets

        found = {}
        for column, kind in (self.data.features or {}).items():
            inner = kind.feature if isinstance(kind, datasets.List | datasets.LargeList) else kind
            if isinstance(inner, datasets.ClassLabel):
                found[column] = list(inner.names)
        return found


def hub_tables(source: str, part_named: Callable[[str], str], streaming: bool = False) -> list[HubTable]:
    """The splits of a set that name a part, or the one that is asked for. `#500`: the first 500 of each."""
    asked = _NAME.fullmatch(source)
    assert asked is not None  # the caller has seen that it looks like a name
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"there is no file or folder {source}, and data sets of the hub need the datasets library, "
            "not installed here\n  pip install 'kitout[hub]'"
        )
    found = _loaded(source, asked["name"], asked["config"], asked["split"], streaming)
    if asked["split"]:
        part = part_named(re.split(r"[\[+]", asked["split"])[0])
        return [HubTable(found, source, part)]
    first, last = int(asked["first"] or 0), int(asked["last"]) if asked["last"] else None
    name = source.partition("#")[0]
    tables = [
        HubTable(_sliced(data, first, last), f"{name}#{split}", part_named(str(split))) for split, data in found.items()
    ]
    parted = [t for t in tables if t.part]
    if not any(t.part == "train" for t in parted):
        splits = ", ".join(map(str, found))
        if len(tables) == 1:
            return [HubTable(tables[0].data, tables[0].where)]
        raise DataError(f"{name} has the splits {splits}; say which to learn from, e.g. {name}#{next(iter(found))}")
    return parted


def _loaded(source: str, name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as wrong:
        raise DataError(
            f"there is no file or folder {source}, and as a data set of the hub it does not load "
            f"({type(wrong).__name__}: {str(wrong)[:300]})"
        ) from wrong


def _sliced(data: Any, first: int, last: int | None) -> Any:
    return data if last is None else data.skip(first).take(last - first)


def _class(names: Sequence[str] | Mapping[int, str], number: Any) -> Any:
    """-1 stands for a label that is kept secret: none."""
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None
