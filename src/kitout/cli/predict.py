"""`kitout predict ADAPTER INPUT`: predictions for new texts, tables and images.

Only options and printing here: `kitout.predict` finds the base, reads the input and writes the file. A command that
was stopped goes on where it was when it is given again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitout.cli.terminal import SIGNALED, read_any_bytes, report_errors

if TYPE_CHECKING:
    from kitout.predict.input_rows import InputRows
    from kitout.predict.output_file import OutputProgress
    from kitout.predict.table import TablePredictor

SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_CHARS = 20, 6, 40  # of a table on a terminal
FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 30.0  # between lines of progress where there is no terminal


def predict(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="its folder, or the run folder of kitout train")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|FOLDER|TEXT|-",
            help="a table (.csv .tsv .jsonl .json .parquet), texts (.txt, one a line), an image or a folder of images, "
            "a text, or - for lines of stdin",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="write .jsonl, .csv, .tsv or .parquet; default: print")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=COLUMN", help="what a column holds, if not as in training: text=body, label=topic"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="inputs of one forward, at most")] = None,
    bad_rows: Annotated[str, typer.Option(metavar="error|skip", help="rows that cannot be read")] = "error",
    probabilities: Annotated[
        bool, typer.Option("--probabilities/--no-probabilities", help="write that of every label")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew, whatever --out holds")] = False,
    model: Annotated[str | None, typer.Option(help="the base: a folder or name; default: as the adapter says")] = None,
    task: Annotated[str | None, typer.Option(help="what an adapter that was made without a task is for")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="of the base; default: as in training")] = None,
) -> None:
    """Predict with an adapter: columns are added to a table, a text gets a line.

    Example: kitout predict runs/reviews/adapter new.csv --out predictions.csv
    """
    with report_errors(), _report_stop(out):
        from kitout.errors import ConfigError

        if bad_rows not in ("error", "skip"):
            raise ConfigError(f"--bad-rows {bad_rows}: expected error or skip")
        pairs = [text.partition("=") if "=" in text else ("", "=", text) for text in column or ()]
        _run(
            adapter, source, out, {role: name for role, _, name in pairs}, batch_size, bad_rows == "skip",
            probabilities, overwrite, {"base": model, "task": task, "device": device, "dtype": dtype},
        )  # fmt: skip


def _run(
    adapter: Path, source: str, out: str | None, columns: dict[str, str], batch_size: int | None, skip_bad: bool,
    probabilities: bool, overwrite: bool, loading: dict[str, Any],
) -> None:  # fmt: skip
    from kitout.errors import ConfigError, DataError
    from kitout.format import escape_terminal
    from kitout.predict.open_input import open_input
    from kitout.predict.output_file import OutputFile, same_file
    from kitout.predict.saved_adapters import one_adapter

    read_any_bytes()
    saved = one_adapter(adapter)
    usage = saved.usage
    rows = None if usage is None else open_input(source, usage, columns, sys.stdin)  # wrong inputs before any model
    output = None if out is None else OutputFile(out, overwrite)
    if output is not None and same_file(output.path, source):
        raise ConfigError(f"--out {out} is the input itself: name another file")
    typer.echo(f"loading {saved.name} and its base ...", err=True)
    import kitout
    from kitout.predict.table import TablePredictor, folder_digest

    predictor = kitout.load(saved.folder, **loading)
    rows = rows or open_input(source, predictor.usage, columns, sys.stdin)
    if usage is None and predictor.usage.labels:
        labels = ", ".join(predictor.usage.labels[:4])
        note = f"note: {saved.name} holds no label names; these are the model's own: {escape_terminal(labels)}, ..."
        typer.echo(note, err=True)
    table = TablePredictor(predictor, batch_size, "skip" if skip_bad else "error", probabilities)
    if output is None:
        _print_predictions(table, rows)
        return
    from kitout.train.loop.stop_on_signal import interrupt_on_sigterm

    with interrupt_on_sigterm(), _progress(rows) as on_progress:
        settings = {**table.settings(folder_digest(saved.folder)), "columns": columns}
        result = table.to_file(rows, output, settings, on_progress)
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    _print_counts(result.progress)
    if not result.progress.num_written:
        raise DataError(f"{rows.name}: no row could be predicted; {result.path} is empty")
    typer.echo(f"{_number(result.progress.num_written, 'prediction')} in {result.path}", err=True)
    if result.score:
        typer.echo(result.score)


def _print_predictions(table: TablePredictor, rows: InputRows) -> None:
    """A line for one text on a terminal, a table for a few rows; elsewhere JSON, one row a line."""
    from kitout.format import escape_terminal
    from kitout.predict.open_input import STDIN_NAME
    from kitout.predict.output_file import to_json
    from kitout.predict.table import Scorer

    is_terminal = sys.stdout.isatty()
    is_typed = rows.name == STDIN_NAME and sys.stdin.isatty()
    progress, scorer, is_scored = None, None, False
    shown: list[dict[str, Any]] = []
    for row, progress in table.stream(rows, 1 if is_typed else SHOWN_ROWS + 1 if is_terminal else None):
        if not is_terminal:
            typer.echo(to_json(row))
        elif rows.path is None:
            from kitout.predict.prediction import from_dict

            typer.echo(escape_terminal(str(from_dict({n: row[c] for n, c in progress.names.items() if c in row}))))
        elif len(shown) == SHOWN_ROWS:
            break
        else:
            shown.append(row)
        is_scored = is_scored or rows.has_references
        if is_scored:
            scorer = scorer or Scorer(rows, progress.names)
            scorer.add(row, row)
    if shown:
        _print_table(shown, list(progress.names.values()) if progress is not None else [])
    for note in rows.notes:
        typer.echo(f"note: {note}", err=True)
    if progress is None:
        from kitout.errors import DataError

        raise DataError(f"{rows.name}: nothing to predict")
    _print_counts(progress)
    if is_terminal and rows.path is not None and progress.num_inputs > SHOWN_ROWS:
        typer.echo(f"these are the first {SHOWN_ROWS} rows: --out predictions.csv predicts all of them", err=True)
    elif scorer is not None and (score := scorer.text()):
        typer.echo(score, err=not is_terminal)


def _print_table(rows: list[dict[str, Any]], predicted: list[str]) -> None:
    """Predicted columns last; of the user's own the first ones, as many as there is room for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kitout.format import format_number, single_line

    names = dict.fromkeys(name for row in rows for name in row)
    new = [name for name in predicted if name in names and not isinstance(rows[0].get(name), dict)]
    own = [name for name in names if name not in predicted][: max(1, SHOWN_COLUMNS - len(new))]
    grid = Table(box=box.SIMPLE, pad_edge=False)
    for name in (*own, *new):
        grid.add_column(Text(single_line(name, SHOWN_CHARS)), overflow="ellipsis", no_wrap=True)
    for row in rows:
        cells = [row.get(name) for name in (*own, *new)]
        texts = [format_number(c) if isinstance(c, float) else "" if c is None else str(c) for c in cells]
        grid.add_row(*(Text(single_line(text, SHOWN_CHARS)) for text in texts))
    Console().print(grid)


def _print_counts(progress: OutputProgress) -> None:
    """What was left out and what was cut, with the first rows of it."""
    from kitout.format import single_line

    for name, column in progress.names.items():
        if column != name and name != "num_truncated":
            typer.echo(f"note: {name!r} is a column of yours: the prediction is in {column!r}", err=True)
    if progress.num_truncated:
        typer.echo(f"truncated: {_number(progress.num_truncated, 'input')} longer than the adapter reads", err=True)
    if progress.num_bad:
        typer.echo(f"left out: {_number(progress.num_bad, 'row')}", err=True)
        for message in progress.bad:
            typer.echo(f"  - {single_line(message, 300)}", err=True)
        if progress.num_bad > len(progress.bad):
            typer.echo(f"  - and {progress.num_bad - len(progress.bad):,} more", err=True)


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _progress(rows: InputRows) -> Iterator[Any]:
    """Gets the number of inputs done: a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            job = bar.add_task("", total=rows.num_rows)
            yield lambda done: bar.update(job, completed=done, total=rows.num_rows)
        return
    start = time.monotonic()
    next_line = start + FIRST_LINE_SECONDS

    def print_line(done: int) -> None:
        nonlocal next_line
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + LINE_SECONDS
            total = f" of about {rows.num_rows:,}" if rows.num_rows else ""
            typer.echo(f"predicting: {done:,}{total}, {time.monotonic() - start:.0f} s", err=True)

    yield print_line


@contextmanager
def _report_stop(out: str | None) -> Iterator[None]:
    """Ctrl-C and SIGTERM say how to go on."""
    import signal

    from kitout.errors import PathError

    try:
        yield
    except PathError:
        if out is not None:
            typer.echo("what is done is kept: the same command goes on where it was", err=True)
        raise
    except KeyboardInterrupt as error:
        resumes = "; the same command goes on where it was" if out is not None else ""
        typer.echo(f"\nstopped{resumes}", err=True)
        raise typer.Exit(SIGNALED + (error.args[0] if error.args else signal.SIGINT)) from None
