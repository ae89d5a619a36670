"""The command line: one verb per file, put together here.

It knows the verbs' names and nothing of what they do; `kitout VERB --help` asks the verb.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kitout.cli import assets, compare, demo, doctor, export, inspect, merge, methods, train
from kitout.version import __version__

HELP = """Parameter-efficient fine-tuning: train small adapters on a frozen transformer.

Start with `kitout demo text`, then `kitout train --model MODEL --data FILE.csv --out FOLDER`."""

app = typer.Typer(name="kitout", help=HELP, no_args_is_help=True)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"kitout {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What all verbs have in common."""


app.add_typer(assets.app, name="assets")
app.add_typer(demo.app, name="demo", help=demo.HELP)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("merge")(merge.merge)
app.command("methods")(methods.methods)
app.command("train", context_settings=train.CONTEXT_SETTINGS)(train.train)


def main() -> None:
    """Entry point of the `kitout` script."""
    app()
