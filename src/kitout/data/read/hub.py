"""Data sets on the Hugging Face hub by name: `owner/name`, `owner/name:config`, `owner/name#split`.

The `datasets` library does the work, and is imported only here; it runs no code of a data set. Classes that a set keeps
as numbers get their names back. It knows no format and no token, and makes no split of its own.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kitout.data.read.arrow_values import name_classes, plain_value
from kitout.data.read.row_sample import RowSample
from kitout.data.read.tables import DataError, Row, Tick, counted
from kitout.install_hint import suggest_install

_SOURCE_PATTERN = re.compile(
    r"(?P<name>[^:#]+)(:(?P<config>[^#]+))?(#((?P<first>\d{1,18}):)?(?P<last>\d{1,18})|#(?P<split>.+))?"
)


@dataclass(frozen=True)
class HubTable:
    """One split of a data set."""

    data: Any
    """A `datasets.Dataset` or `IterableDataset`."""
    source: str
    """The name for messages and locations."""
    split: str = ""
    """train, validation or test; "" if its name is none of them."""
    note: str = ""
    """As a table of a file has it; a data set of the hub says itself how it is read."""

    def read_rows(
        self, skipped: list[str] | None = None, tick: Tick | None = None, sample: RowSample | None = None
    ) -> list[Row]:
        """skipped: of files that cannot be read in part; the library reads all or none. tick, sample: see `tables`."""
        read = counted(self.iter_rows(), tick, f"reading {self.source}")
        rows = list(read) if sample is None else sample.draw(read)
        if not rows:
            raise DataError(f"{self.source} has no rows")
        return rows

    def iter_rows(self, skipped: list[str] | None = None) -> Iterator[Row]:
        for number, row in enumerate(self.data, start=1):
            plain = {name: plain_value(value) for name, value in row.items()}
            yield number, plain | {c: name_classes(names, plain[c]) for c, names in self._class_names.items()}

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """Column -> names of its classes, for columns of class numbers or of lists of them."""
        import datasets

        class_names = {}
        for column, feature in (self.data.features or {}).items():
            element = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
            if isinstance(element, datasets.ClassLabel):
                class_names[column] = list(element.names)
        return class_names


def open_hub_tables(source: str, split_named: Callable[[str], str], streaming: bool = False) -> list[HubTable]:
    """The train, validation and test splits of a set, or the requested one. `#500`: the first 500 rows of each."""
    match = _SOURCE_PATTERN.fullmatch(source)
    assert match is not None  # the caller has seen that it looks like a name
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"there is no file or folder {source}, and data sets of the hub need the datasets library, "
            f"not installed here\n  {suggest_install(extra='hub')}"
        )
    dataset = _load_dataset(source, match["name"], match["config"], match["split"], streaming)
    if match["split"]:
        return [HubTable(dataset, source, split_named(re.split(r"[\[+]", match["split"])[0]))]
    start, stop = int(match["first"] or 0), int(match["last"]) if match["last"] else None
    name = source.partition("#")[0]
    tables = [
        HubTable(_slice_rows(data, start, stop), f"{name}#{split}", split_named(str(split)))
        for split, data in dataset.items()
    ]
    named = [table for table in tables if table.split]
    if any(table.split == "train" for table in named):
        return named
    if len(tables) == 1:
        return [HubTable(tables[0].data, tables[0].source)]
    splits = ", ".join(map(str, dataset))
    raise DataError(f"{name} has the splits {splits}; choose one to train on, e.g. {name}#{next(iter(dataset))}")


def _load_dataset(source: str, name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"there is no file or folder {source}, and as a data set of the hub it does not load "
            f"({type(error).__name__}: {str(error)[:300]})"
        ) from error


def _slice_rows(data: Any, start: int, stop: int | None) -> Any:
    return data if stop is None else data.skip(start).take(stop - start)
