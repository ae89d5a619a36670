"""The command line: one verb per file, put together here.

It knows the verbs' names and nothing of what they do; `kitout VERB --help` asks the verb.
"""

from __future__ import annotations

import typer

from kitout.cli import assets, combine, convert, demo, extract, inspect, methods, train

HELP = """Parameter-efficient fine-tuning: train small adapters on a frozen transformer.

Start with `kitout demo text`, then `kitout train --model MODEL --data FILE.csv --out FOLDER`."""

app = typer.Typer(name="kitout", help=HELP, no_args_is_help=True)
app.add_typer(assets.app, name="assets")
app.add_typer(demo.app, name="demo", help=demo.HELP)
app.command("combine")(combine.combine)
app.command("convert")(convert.convert)
app.command("extract")(extract.extract)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("train", context_settings=train.CONTEXT_SETTINGS)(train.train)


def main() -> None:
    """Entry point of the `kitout` script."""
    app()
