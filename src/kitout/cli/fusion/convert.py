"""`kitout convert ADAPTER --to LoRA --rank 8 --out DIR`: one adapter in another form.

Only options and printing here; `kitout.convert` does the work, and `fused.py` proves what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import kitout
from kitout.cli.fusion.fused import finish, logits, name_for, result_form
from kitout.cli.terminal import report_errors
from kitout.errors import ConfigError


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new or empty folder")],
    to: Annotated[str, typer.Option(help="LoRA (with --rank or --energy), dense, or PrefixTuning for a prompt")],
    rank: Annotated[int | None, typer.Option(help="of --to LoRA")] = None,
    energy: Annotated[float | None, typer.Option(help="of --to LoRA: the share that each site keeps")] = None,
    lora_bias: Annotated[bool, typer.Option("--lora-bias", help="of --to LoRA: it holds biases as well")] = False,
    max_residual: Annotated[float, typer.Option(help="the share of the change that may be lost")] = 0.1,
    drop: Annotated[str | None, typer.Option(help="what may be left out: 'biases norms other'")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="the base: a folder or a name; default: as the adapter says")
    ] = None,
    task: Annotated[str | None, typer.Option(help="of an adapter that was not made by kitout train")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write an adapter in another form: as LoRA of a rank, as trained copies, a prompt as a prefix.

    The folder is opened again, and the largest logit difference and the residual by role are printed.

    Example: kitout convert runs/a/adapter --to LoRA --rank 8 --out smaller
    """
    with report_errors():
        form = result_form(to, rank, energy, lora_bias)
        predictor = kitout.load(adapter, base=model, task=task, device=device, dtype="float32")
        kit, names = predictor.kit, predictor.loaded
        if len(names) != 1:
            raise ConfigError(f"{adapter} holds {', '.join(names)}: name the folder of one of them")
        (source,) = names
        fused = kitout.convert(kit, source, name_for(out, kit), to=form, max_residual=max_residual, drop=drop)
        finish(kit, fused, out, lambda kit: logits(kit, source))
