"""`kitout export ADAPTER --to FORMAT --out DIR`: an adapter in the format of another library.

Only options and printing here; `kitout.export` does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kitout.cli.terminal import report_errors


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="an adapter folder, or a run folder with one")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new or empty folder")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="peft")] = "peft",
    model: Annotated[
        str | None, typer.Option(metavar="M", help="the base: a folder or a name; default: as the adapter says")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the base in the comparison; default: of the base's own files")
    ] = None,
    task: Annotated[str | None, typer.Option(help="of an adapter that was not made by kitout train")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write an adapter in the format of another library, which loads it again where it is installed.

    Both are compared on a batch before the folder appears, and the largest
    difference is printed. What the format cannot hold is refused.

    Example: kitout export runs/reviews/adapter --to peft --out reviews-peft
    """
    with report_errors():
        from kitout.export import export_adapter

        exported = export_adapter(
            adapter, out, to=to, base=model, task=task, device=device, dtype=dtype,
            log=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
        typer.echo(str(exported))
