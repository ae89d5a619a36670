"""`kitout doctor`: versions, device, speed of dtypes, cache, optional parts, and what is wrong with each fix.

Only options and printing here; `kitout.doctor` does the work.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kitout.cli.terminal import report_errors


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show versions, device, speed of dtypes, memory, cache and optional parts, and say what is wrong.

    Each problem is one line with its fix. The exit status is 1 only if something that kitout needs does not work.

    Example: kitout doctor --json > doctor.json
    """
    with report_errors():
        from kitout.doctor import diagnose

        if not as_json:
            typer.echo("looking at packages, device and cache: a few seconds", err=True)
        result = diagnose()
        typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result.ok:
        raise typer.Exit(1)
