"""How every verb meets the terminal: an error is one line and an exit status; any text can be printed.

It knows the errors of kitout, how settings and unknown options are shown, and no verb.
"""

from __future__ import annotations

import io
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import typer

from kitout.errors import ConfigError, Errors, KitoutError
from kitout.format import escape_terminal

if TYPE_CHECKING:
    from kitout.train.config.describe import SectionDoc

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
        typer.echo("\nstopped; the same command resumes from the last checkpoint, if there is one", err=True)
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


def refuse_options(
    args: Iterable[str], options: Sequence[str], schema: Any, advice: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """`--lr 1e-4` -> write train.lr=..., for every unknown option. schema: of the settings that may be meant.

    advice: in place of the schema's `foreign_keys`.
    """
    from kitout.train.config.error_messages import hint_for_key

    errors = Errors(ConfigError, "options")
    advice_at = None if advice is None else lambda _location: advice
    for option in args:
        name, _, value = option.partition("=")
        key = name.lstrip("-").replace("-", "_")
        hint = get_close_matches(name, options, n=1, cutoff=0.8)
        known = hint_for_key(key, schema, advice_at) if "." not in key else None
        instead = f"did you mean {hint[0]}?" if hint else known
        instead = instead or f"write a setting as {key}={value or 'VALUE'}, without dashes"
        errors.add(f"there is no option {name}; {instead}")
    errors.raise_if_any()


def print_settings(sections: Iterable[SectionDoc]) -> None:
    """Every setting with its type, default and text, by section."""
    typer.secho("Settings", bold=True, nl=False)
    typer.echo(", as name=value here or as sections of a run.yaml:\n")
    for section in sections:
        typer.echo(indent(section.text, 0))
        for setting in section.settings:
            default = f" = {setting.default}" if setting.default else ", required"
            typer.secho(
                f"  {section.name}.{setting.name}" if section.name else f"  {setting.name}", bold=True, nl=False
            )
            typer.echo(f"  {setting.kind}{default}")
            if setting.text:
                typer.echo(indent(setting.text, 6))
        typer.echo()


def indent(text: str, num_spaces: int = 2) -> str:
    """Wrapped to the page width; several lines (commands) stay as they are."""
    lines = text.split("\n")
    wrapped = lines if len(lines) > 1 else textwrap.wrap(text, 100)
    return textwrap.indent("\n".join(wrapped), " " * num_spaces)
