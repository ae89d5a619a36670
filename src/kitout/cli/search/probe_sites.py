"""`kitout probe-sites RUN.YAML`: which linear sites matter for a run's data, from one pass, before anything is trained.

Only options and printing here; `kitout.search.probe_run` does the work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kitout.cli.terminal import refuse_options, report_errors

CONTEXT_SETTINGS = {"ignore_unknown_options": True}
OPTIONS = ("--by", "--examples", "--max-trainable-parameters", "--gora", "--json", "--out", "--help")


def probe_sites(
    args: Annotated[
        list[str],
        typer.Argument(metavar="RUN.YAML|NAME=VALUE", help="a run of `kitout train`, and settings by dotted name"),
    ],
    by: Annotated[str, typer.Option(help="what sorts the table: gradient, eva or gora")] = "gradient",
    examples: Annotated[int, typer.Option(min=1, help="of the training data")] = 256,
    max_trainable_parameters: Annotated[
        int | None, typer.Option(min=1, help="of the ranks that are shown; default: those of rank 8 everywhere")
    ] = None,
    gora: Annotated[
        bool, typer.Option("--gora", help="also mean |W * G|, which needs whole gradients: further passes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write signals.json and heat maps of blocks x roles (PNG, SVG)")
    ] = None,
) -> None:
    """Show which linear sites matter for a run, from one pass over its data: gradients, inputs, ranks. Trains nothing.

    Example: kitout probe-sites run.yaml --out sites
    """
    with report_errors():
        from kitout.errors import ConfigError
        from kitout.search.allocation import CRITERIA
        from kitout.search.probe_run import probe_sites as probe
        from kitout.search.probe_run import write_ranking
        from kitout.train.config import overrides
        from kitout.train.config.schema import RunConfig

        refuse_options([arg for arg in args if arg.startswith("-")], OPTIONS, RunConfig)
        files = [arg for arg in args if not overrides.is_override(arg)]
        if len(files) > 1:
            raise ConfigError(f"one run.yaml at a time, not {', '.join(files)}; write a setting as name=value")
        known = [name for name in CRITERIA if name != "uniform"]
        if by not in known:
            raise ConfigError(f"--by {by}: choose one of {', '.join(known)}")
        settings = [arg for arg in args if overrides.is_override(arg)]
        config = overrides.build_config(Path(files[0]) if files else None, settings, _log)
        ranking = probe(
            config, by=by, num_examples=examples, budget=max_trainable_parameters, gora=gora or by == "gora", log=_log
        )
        typer.echo(json.dumps(ranking.to_dict(), indent=2) if as_json else str(ranking))
        if out is not None:
            typer.echo(f"written: {', '.join(map(str, write_ranking(ranking, out)))}", err=True)


def _log(line: str) -> None:
    typer.echo(line, err=True)
