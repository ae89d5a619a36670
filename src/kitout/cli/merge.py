"""`kitout merge ADAPTER... --out DIR`: adapters folded into their base, as a plain transformers folder.

Only options and printing here; `kitout.export` does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kitout.cli.terminal import report_errors


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="adapter folders, or run folders")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new or empty folder")],
    model: Annotated[
        str | None, typer.Option(metavar="M", help="the base: a folder or a name; default: as the adapter says")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the weights: float32, bfloat16, float16; default: of the base's own files")
    ] = None,
    task: Annotated[str | None, typer.Option(help="of an adapter that was not made by kitout train")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Merge adapters into their base and write a plain transformers folder, which needs no kitout.

    Several adapters act one after the other, in the order given.
    Before the folder appears, transformers alone loads it and it is compared
    with the kit on a batch; the largest difference is printed.

    Example: kitout merge runs/reviews/adapter --out merged
    """
    with report_errors():
        from kitout.export import merge_to_folder

        merged = merge_to_folder(
            adapters, out, base=model, task=task, device=device, dtype=dtype,
            log=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
        typer.echo(str(merged))
