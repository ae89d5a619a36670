"""`kitout extract --model M --tuned M2 --rank 32 --out DIR`: an adapter out of a model and its fine-tuned copy.

Only options and printing here; `kitout.extract` does the work, and `fused.py` proves what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import kitout
from kitout.cli.fusion.fused import finish, logits, name_for
from kitout.cli.terminal import report_errors


def extract(
    model: Annotated[str, typer.Option(metavar="M", help="the base: a folder or a name")],
    tuned: Annotated[str, typer.Option(metavar="M2", help="the fine-tuned copy: a folder or a name")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new or empty folder")],
    rank: Annotated[int | None, typer.Option(help="of every site; default 32")] = None,
    energy: Annotated[float | None, typer.Option(help="in place of a rank: the share that each site keeps")] = None,
    targets: Annotated[str, typer.Option(help="where, as a LoRA's targets")] = "all-linear",
    task: Annotated[str | None, typer.Option(help="causal_lm, classification, ...: which head the model has")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write the difference of a fine-tuned model from its base as a LoRA.

    The folder is opened again, and the largest logit difference from the
    fine-tuned model and the residual by role are printed.

    Example: kitout extract --model base --tuned tuned --rank 32 --out adapter
    """
    with report_errors():
        kit = kitout.load(base=model, task=task, device=device, dtype="float32").kit
        other = kitout.load(base=tuned, task=task, device=device, dtype="float32").kit
        fused = kitout.extract(kit, other, name_for(out, kit), rank=rank, energy=energy, targets=targets)
        finish(kit, fused, out, lambda kit: logits(kit, None, other))
