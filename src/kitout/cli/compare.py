"""`kitout compare RUN RUN...`: finished runs in one table, each with its metrics, intervals and cost.

Only options and printing here; `kitout.compare` does the work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kitout.cli.terminal import report_errors


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of finished runs of `kitout train`")],
    each_seed: Annotated[
        bool, typer.Option("--each-seed", help="a row for every run, also where only the seed differs")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="write the table as CSV too")] = None,
) -> None:
    """Compare finished runs: metrics on the test split with intervals, trainable parameters, time, memory.

    Only metrics that all runs have; it says where the test data differ.
    Runs that differ in train.seed alone become one row with their number.
    No run is named the best.

    Example: kitout compare runs/lora runs/adaptformer --out table.csv
    """
    with report_errors():
        from kitout.compare import compare_runs, write_csv

        table = compare_runs(runs, group_seeds=not each_seed)
        if out is not None:
            write_csv(table, out)
        typer.echo(json.dumps(table.to_dict(), indent=2, ensure_ascii=False) if as_json else str(table))
        if out is not None:
            typer.echo(f"written: {out}", err=True)
