"""`kitout search PLAN.YAML [name=value ...]`: many designs under a budget, the best confirmed on the test split.

Only options here; `kitout.search.run` does the work. The settings in --help and --json-schema come from the plan's own
schema. An interrupted search goes on when the same command is given again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kitout.cli.terminal import print_settings, refuse_options, report_errors, report_interrupt

OPTIONS = ("--dry-run", "--example", "--help", "--json-schema")
CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": [], "ignore_unknown_options": True}
EXAMPLES = """\
kitout search --example > plan.yaml; kitout search plan.yaml --dry-run
kitout search plan.yaml candidates=8 space.lr.multipliers=1 out=runs/small"""


def search(
    context: typer.Context,
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="PLAN.YAML|NAME=VALUE", help="a plan, and settings by dotted name", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the rungs and what they will take, train nothing")
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="print a plan.yaml to start from")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="print the JSON schema of a plan.yaml")] = False,
    help_: Annotated[bool, typer.Option("--help", help="show this and every setting of a plan")] = False,
) -> None:
    """Search where adapters go, which and how large, under a budget: many designs in shared batches, the best
    confirmed.
    """
    words = list(args or [])
    with report_errors(), report_interrupt():
        if help_ or not (words or example or json_schema):
            from kitout.search.plan.describe import plan_sections

            typer.echo(context.get_help())
            typer.echo("\nSettings of run are those of `kitout train --help`: run.train.steps=200.\n")
            print_settings(plan_sections())
            typer.echo(EXAMPLES)
        elif example:
            from kitout.search.plan.describe import EXAMPLE

            typer.echo(EXAMPLE, nl=False)
        elif json_schema:
            from kitout.search.plan.schema import SearchPlan

            typer.echo(json.dumps(SearchPlan.model_json_schema(), indent=2, ensure_ascii=False))
        else:
            _search(words, dry_run)


def _search(words: list[str], dry_run: bool) -> None:
    from kitout.errors import ConfigError
    from kitout.search.plan.load import build_plan
    from kitout.search.plan.schema import SearchPlan
    from kitout.train.config import overrides

    refuse_options([word for word in words if word.startswith("-")], OPTIONS, SearchPlan)
    files = [word for word in words if not overrides.is_override(word)]
    if len(files) != 1:
        found = ", ".join(files) or "none"
        raise ConfigError(f"one plan.yaml is required, found {found}\n  kitout search --example > plan.yaml")
    plan = build_plan(Path(files[0]), [word for word in words if overrides.is_override(word)], typer.echo)
    from kitout.search.runner import run

    run(plan, dry_run=dry_run, log=typer.echo)
