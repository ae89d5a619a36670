"""`kitout advise [RUN.YAML] [name=value ...]`: the finished runs nearest to a planned one, and what they chose.

Only options and printing here; `kitout.search.advise` does the work. Nothing is trained and no weight is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kitout.cli.terminal import report_errors


def advise(
    args: Annotated[
        list[str],
        typer.Argument(metavar="RUN.YAML|NAME=VALUE", help="as `kitout train` takes them", show_default=False),
    ],
    limit: Annotated[int, typer.Option(min=1, help="how many runs to list at most")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the finished runs nearest to a planned one: what they chose and what they gained over the base.

    Near is a sum of doublings, of parameters, depth, width and examples; another task counts as four of them.
    Every finished run leaves a row of numbers, with nothing of its data; KITOUT_RUNS=off keeps none.

    Example: kitout advise run.yaml
    """
    with report_errors():
        from kitout.errors import ConfigError
        from kitout.train.config import overrides

        files = [arg for arg in args if not overrides.is_override(arg)]
        if len(files) > 1:
            raise ConfigError(f"one run.yaml at a time, not {', '.join(files)}; write a setting as name=value")
        settings: list[overrides.Override | str] = [*filter(overrides.is_override, args)]
        config = overrides.build_config(Path(files[0]) if files else None, settings, _to_stderr)

        from kitout.search.advise import advise as find_nearest

        found = find_nearest(config, limit=limit, log=_to_stderr)
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else str(found))


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)
