"""`kitout train [RUN.YAML] [name=value ...]`: train an adapter, measure it and write a report.

Only words here; `kitout.train.run` does the work. What --help says of settings, --example and --json-schema come from
the config's own model. An interrupted run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = """\
kitout train --model smollm2-135m --data tweets --out runs/first train.steps=40
kitout train --model MODEL --data reviews.csv --method IA3 objective=classify train.epochs=3 --dry-run
kitout train --example > run.yaml; kitout train run.yaml method.rank=16 train.lr=5e-4 data.validation=dev.jsonl"""

# The verb prints its own help: typer's own, then every setting.
SETTINGS: dict[str, Any] = {"help_option_names": []}


def train(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.YAML|NAME=VALUE", help="a file, and settings by dotted name", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="short for model.name=...")] = None,
    data: Annotated[str | None, typer.Option(help="short for data.train=...")] = None,
    method: Annotated[str | None, typer.Option(help="short for method=...; `kitout methods` lists them")] = None,
    out: Annotated[Path | None, typer.Option(help="short for output.folder=...")] = None,
    prove_merge: Annotated[bool, typer.Option("--prove-merge", help="short for evaluate.prove_merge=true")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="look at everything, train nothing")] = False,
    example: Annotated[bool, typer.Option("--example", help="print a run.yaml to begin with")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="print the JSON schema of a run.yaml")] = False,
    help_: Annotated[bool, typer.Option("--help", help="show this, and every setting")] = False,
) -> None:
    """Train an adapter on your data, measure it against the base, and write a report."""
    from kitout.errors import KitoutError

    _bear_any_text()
    try:
        if help_:
            _help(context)
        elif example:
            _example()
        elif json_schema:
            _json_schema()
        else:
            short = {"model.name": model, "data.train": data, "method": method, "output.folder": out}
            said: dict[str, Any] = {name: str(value) for name, value in short.items() if value is not None}
            _run(words or [], said | ({"evaluate.prove_merge": True} if prove_merge else {}), dry_run)
    except KitoutError as wrong:
        typer.echo(f"error: {wrong}", err=True)
        raise typer.Exit(1) from wrong
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


def _run(words: list[str], short: dict[str, Any], dry_run: bool) -> None:
    from kitout.errors import ConfigError
    from kitout.train.config import overrides

    files = [word for word in words if not overrides.is_override(word)]
    if not words and not short:
        raise ConfigError(f"say what to train: a run.yaml, or --model and --data\n{_indented(EXAMPLES)}")
    if len(files) > 1:
        raise ConfigError(f"one run.yaml at a time, found {', '.join(files)}; a setting is written name=value")
    said: list[overrides.Value | str] = [*short.items(), *(word for word in words if overrides.is_override(word))]
    config = overrides.config(Path(files[0]) if files else None, said)
    from kitout.train.run import run  # torch and transformers: only once the words are right

    run(config, dry_run=dry_run, say=typer.echo)


def _example() -> None:
    from kitout.train.config.describe import example

    typer.echo(example(), nl=False)


def _json_schema() -> None:
    from kitout.train.config.schema import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))


def _help(context: typer.Context) -> None:
    from kitout.data.examples.formats import FORMATS
    from kitout.train.config.describe import Setting, sections

    def told(setting: Setting, section: str) -> None:
        name = f"{section}.{setting.name}" if section else setting.name
        default = f" = {setting.default}" if setting.default else ", must be said"
        typer.secho(f"  {name}", bold=True, nl=False)
        typer.echo(f"  {setting.kind}{default}")
        if setting.text:
            typer.echo(_indented(setting.text, 6))

    typer.echo(context.get_help())
    typer.secho("Settings", bold=True, nl=False)
    typer.echo(", by name=value here or as sections of a run.yaml:\n")
    for section in sections():
        typer.echo(_indented(section.text, 0))
        for setting in section.settings:
            told(setting, section.name)
        typer.echo()
    typer.echo("Formats of the data, found by the columns (or said: data.train.format):")
    for made in FORMATS.values():
        typer.echo(_indented(str(made)))
    typer.echo(f"\nExamples:\n{_indented(EXAMPLES)}")


def _indented(text: str, by: int = 2) -> str:
    """Wrapped to a page; a line that is a command stays in one piece."""
    import textwrap

    lines = text.split("\n")
    wrapped = lines if len(lines) > 1 else textwrap.wrap(text, 100)
    return textwrap.indent("\n".join(wrapped), " " * by)


def _bear_any_text() -> None:
    """Data may hold what the terminal's encoding has not: shown as escapes, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
