"""What the user sees while the demo works: a live bar on a terminal, plain lines anywhere else.

A phase is a title, a total and calls that say how far it is. It knows nothing of what is being done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Tell = Callable[[int, int, str], None]  # done, total, a note such as the loss
LINES = 8  # plain lines per phase, at most, beside the first and the last


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)

    def say(self, words: str = "") -> None:
        self.console.print(words, markup=False, highlight=False)

    @contextmanager
    def phase(self, title: str) -> Iterator[Tell]:
        if not self.console.is_terminal:
            yield self._lines(title)
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
        with Progress(TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task(title, total=None, note="")

            def tell(done: int, total: int, note: str) -> None:
                bar.update(task, completed=done, total=total, note=note)

            yield tell

    def _lines(self, title: str) -> Tell:
        start, last = time.perf_counter(), -1

        def tell(done: int, total: int, note: str) -> None:
            nonlocal last
            now = LINES * done // max(1, total)
            if now != last or done == total:
                last = now
                self.say(f"{title}: {done}/{total}{'  ' + note if note else ''}  {time.perf_counter() - start:.0f} s")

        return tell

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", header_style="bold")
        for number, name in enumerate(header):
            table.add_column(name, overflow="fold", justify="left" if number == 0 else "default")
        for row in rows:
            table.add_row(*row)
        self.console.print(table, markup=False, highlight=False)
