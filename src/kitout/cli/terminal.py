"""How every verb meets the terminal: an error is one line and an exit status; any text can be printed.

It knows the errors of kitout and no verb.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kitout.errors import KitoutError
from kitout.format import escape_terminal

SIGNALED = 128  # exit status, as shells have it: 130 for Ctrl-C, 143 for SIGTERM


@contextmanager
def report_errors() -> Iterator[None]:
    """An error that the user can correct is printed without a traceback, and ends with exit status 1."""
    escape_unencodable()
    try:
        yield
    except KitoutError as error:
        typer.echo(f"error: {escape_terminal(str(error))}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def report_interrupt() -> Iterator[None]:
    """Ctrl-C or SIGTERM during a run says how to resume it."""
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT  # a run raises it with the signal's number
        typer.echo("\nstopped; the same command resumes from the last checkpoint", err=True)
        raise typer.Exit(SIGNALED + number) from None


def announce_loading() -> None:
    """A line before what takes seconds to import, on the stream of errors: output may be read by programs."""
    if "transformers" not in sys.modules:
        typer.echo("loading torch and transformers ...", err=True)


def read_any_bytes() -> None:
    """Lines of stdin are UTF-8; bytes that are not are marked (surrogateescape), not an error of the whole stream."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def escape_unencodable() -> None:
    """Data may hold characters that the terminal's encoding lacks: they are shown as escapes, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
