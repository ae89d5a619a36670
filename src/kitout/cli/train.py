"""`kitout train [RUN.YAML] [name=value ...]`: train an adapter, measure it and write a report.

Only options here; `kitout.train.run` does the work. The settings in --help, --example and --json-schema come from the
config's own schema. An interrupted run resumes from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kitout.cli.terminal import indent, print_settings, refuse_options, report_errors, report_interrupt

EXAMPLES = """\
kitout train --model smollm2-135m --data tweets --out runs/first train.steps=40
kitout train --model MODEL --data reviews.csv --method IA3 objective=classification train.epochs=3 --dry-run
kitout train --example > run.yaml; kitout train run.yaml method.rank=16 train.lr=5e-4 data.validation=dev.jsonl"""

OPTIONS = ("--model", "--data", "--method", "--from", "--out", "--prove-merge", "--dry-run", "--example", "--help",
           "--json-schema")  # fmt: skip
# The verb prints its own help: typer's own, then every setting. It says itself what to write for an unknown option.
CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": [], "ignore_unknown_options": True}


def train(
    context: typer.Context,
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.YAML|NAME=VALUE", help="a file, and settings by dotted name", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="short for model.name=...")] = None,
    data: Annotated[str | None, typer.Option(help="short for data.train=...")] = None,
    method: Annotated[str | None, typer.Option(help="short for method=...; `kitout methods` lists them")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="short for train.from=...: continue an adapter")] = None,
    out: Annotated[Path | None, typer.Option(help="short for output.folder=...")] = None,
    prove_merge: Annotated[bool, typer.Option("--prove-merge", help="short for evaluate.prove_merge=true")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the pre-flight, train nothing")] = False,
    example: Annotated[bool, typer.Option("--example", help="print a run.yaml to start from")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="print the JSON schema of a run.yaml")] = False,
    help_: Annotated[bool, typer.Option("--help", help="show this and every setting")] = False,
) -> None:
    """Train an adapter on your data, evaluate it against the base, write a report."""
    with report_errors(), report_interrupt():
        if help_:
            _print_help(context)
        elif example:
            from kitout.train.config.describe import example_yaml

            typer.echo(example_yaml(), nl=False)
        elif json_schema:
            from kitout.train.config.schema import RunConfig

            typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))
        else:
            options: dict[str, Any] = {"model.name": model, "data.train": data, "method": method, "output.folder": out}
            options["train.from"] = from_
            shorthands: dict[str, Any] = {name: str(value) for name, value in options.items() if value is not None}
            _run_training(args or [], shorthands | ({"evaluate.prove_merge": True} if prove_merge else {}), dry_run)


def _run_training(args: list[str], shorthands: dict[str, Any], dry_run: bool) -> None:
    from kitout.errors import ConfigError
    from kitout.train.config import overrides
    from kitout.train.config.schema import RunConfig

    refuse_options([arg for arg in args if arg.startswith("-")], OPTIONS, RunConfig)
    files = [arg for arg in args if not overrides.is_override(arg)]
    if not args and not shorthands:
        raise ConfigError(f"a run.yaml is required, or --model and --data\n{indent(EXAMPLES)}")
    if len(files) > 1:
        raise ConfigError(f"one run.yaml at a time, not {', '.join(files)}; write a setting as name=value")
    settings: list[overrides.Override | str] = [*shorthands.items(), *filter(overrides.is_override, args)]
    config = overrides.build_config(Path(files[0]) if files else None, settings, typer.echo)
    from kitout.train.start import start

    start(config, dry_run=dry_run, log=typer.echo)


def _print_help(context: typer.Context) -> None:
    from kitout.data.examples.format_table import FORMATS
    from kitout.train.config.describe import sections

    typer.echo(context.get_help())
    print_settings(sections())
    typer.echo("Data formats, detected by the columns (or set by data.train.format):")
    for data_format in FORMATS.values():
        if data_format.kind == "training":
            typer.echo(indent(str(data_format)))
    typer.echo("\nFormats that `kitout align` reads:")
    for data_format in FORMATS.values():
        if data_format.kind != "training":
            typer.echo(indent(str(data_format)))
    typer.echo(f"\nExamples:\n{indent(EXAMPLES)}")
