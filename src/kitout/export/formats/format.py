"""What a format of another library has to provide: writing an adapter, and loading it again to compare.

It knows no format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kitout.kit import Kit


class AdapterFormat(ABC):
    """One format; its instance is an entry of `FORMATS`."""

    name: str
    """As `--to` has it."""
    package: str
    """The package that reads it, by which it is compared where that is installed."""

    @abstractmethod
    def write(self, kit: Kit, adapter: str, folder: Path) -> None:
        """Writes the adapter into an empty folder; FileError with every reason for what the format cannot hold."""

    @abstractmethod
    def load(self, model: Any, folder: Path) -> Any:
        """A plain copy of the base with the adapter, by the other library alone; called like the model itself."""

    def notes(self, kit: Kit, adapter: str, folder: Path) -> Iterator[str]:
        """What whoever uses the folder should know: how to load it, what does not read it."""
        yield from ()
