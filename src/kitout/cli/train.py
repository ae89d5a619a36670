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
kitout train --model MODEL --data reviews.csv --method IA3 objective=classification train.epochs=3 --dry-run
kitout train --example > run.yaml; kitout train run.yaml method.rank=16 train.lr=5e-4 data.validation=dev.jsonl"""

# The verb prints its own help: typer's own, then every setting.
CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": []}


def train(
    context: typer.Context,
    args: Annotated[
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

    _escape_unencodable()
    try:
        if help_:
            _print_help(context)
        elif example:
            _print_example()
        elif json_schema:
            _print_json_schema()
        else:
            short = {"model.name": model, "data.train": data, "method": method, "output.folder": out}
            said: dict[str, Any] = {name: str(value) for name, value in short.items() if value is not None}
            _run_training(args or [], said | ({"evaluate.prove_merge": True} if prove_merge else {}), dry_run)
    except KitoutError as wrong:
        typer.echo(f"error: {wrong}", err=True)
        raise typer.Exit(1) from wrong
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


def _run_training(args: list[str], shorthands: dict[str, Any], dry_run: bool) -> None:
    from kitout.errors import ConfigError
    from kitout.train.config import overrides

    files = [word for word in args if not overrides.is_override(word)]
    if not args and not shorthands:
        raise ConfigError(f"say what to train: a run.yaml, or --model and --data\n{_indent(EXAMPLES)}")
    if len(files) > 1:
        raise ConfigError(f"one run.yaml at a time, found {', '.join(files)}; a setting is written name=value")
    said: list[overrides.Override | str] = [
        *shorthands.items(),
        *(word for word in args if overrides.is_override(word)),
    ]
    config = overrides.build_config(Path(files[0]) if files else None, said)
    from kitout.train.run import run  # torch and transformers: only once the words are right

    run(config, dry_run=dry_run, log=typer.echo)


def _print_example() -> None:
    from kitout.train.config.describe import example_yaml

    typer.echo(example_yaml(), nl=False)


def _print_json_schema() -> None:
    from kitout.train.config.schema import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))


def _print_help(context: typer.Context) -> None:
    from kitout.data.examples.formats import FORMATS
    from kitout.train.config.describe import SettingDoc, sections

    def print_setting(setting: SettingDoc, section: str) -> None:
        name = f"{section}.{setting.name}" if section else setting.name
        default = f" = {setting.default}" if setting.default else ", must be said"
        typer.secho(f"  {name}", bold=True, nl=False)
        typer.echo(f"  {setting.kind}{default}")
        if setting.text:
            typer.echo(_indent(setting.text, 6))

    typer.echo(context.get_help())
    typer.secho("Settings", bold=True, nl=False)
    typer.echo(", by name=value here or as sections of a run.yaml:\n")
    for section in sections():
        typer.echo(_indent(section.text, 0))
        for setting in section.settings:
            print_setting(setting, section.name)
        typer.echo()
    typer.echo("Formats of the data, found by the columns (or said: data.train.format):")
    for made in FORMATS.values():
        typer.echo(_indent(str(made)))
    typer.echo(f"\nExamples:\n{_indent(EXAMPLES)}")


def _indent(text: str, num_spaces: int = 2) -> str:
    """Wrapped to a page; a line that is a command stays in one piece."""
    import textwrap

    lines = text.split("\n")
    wrapped = lines if len(lines) > 1 else textwrap.wrap(text, 100)
    return textwrap.indent("\n".join(wrapped), " " * num_spaces)


def _escape_unencodable() -> None:
    """Data may hold what the terminal's encoding has not: shown as escapes, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
