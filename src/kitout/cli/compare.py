"""`kitout compare RUN RUN...`: finished runs in one table, each with its metrics, intervals and cost; ranked by seeds.

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
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE.csv", help="write a report with pictures, CSV and JSON; or the table as CSV"),
    ] = None,
) -> None:
    """Compare finished runs: metrics on the test split with intervals, trainable parameters, time, memory.

    Only metrics that all runs have; it says where the test data differ.
    Runs that differ in train.seed alone become one row, and so do the seeds of train.seeds.
    From three seeds rows have a group: two that share a letter do not differ significantly.

    Example: kitout compare runs/methods --out comparison
    """
    with report_errors():
        from kitout.compare import compare_runs, write_csv, write_folder

        table = compare_runs(runs, group_seeds=not each_seed)
        if out is not None:
            (write_csv if out.suffix.lower() == ".csv" else write_folder)(table, out)
        typer.echo(json.dumps(table.to_dict(), indent=2, ensure_ascii=False) if as_json else str(table))
        if out is not None:
            typer.echo(f"written: {out}", err=True)
