"""What `combine`, `convert` and `extract` share: the form of a result, its folder, and the proof that it holds.

A result is written, opened again, and its logits on sampled rows are compared with those of what was asked for. Where
nothing should be lost, a larger difference than `TOLERANCE` ends with exit status 1. It knows no rule and no rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

import kitout
from kitout.base.eval_mode import eval_mode
from kitout.base.probe.dummy_batch import dummy_batch
from kitout.errors import ConfigError
from kitout.fuse.residual import FusedAdapter
from kitout.kit import Kit

TOLERANCE = 1e-3  # of logits, where nothing should be lost
EXACT = 1e-5  # residual below which nothing is lost but rounding
ROWS = 4
FORMS = ("exact", "dense", "LoRA", "PrefixTuning")


def result_form(to: str, rank: int | None, energy: float | None, lora_bias: bool) -> Any:
    """`to=` of kitout.combine and kitout.convert, from options. ConfigError for those that do not fit together."""
    forms = {form.lower(): form for form in FORMS}
    form = forms.get(to.lower())
    if form is None:
        raise ConfigError(f"--to {to}: write one of {', '.join(FORMS)}")
    if form == "LoRA":
        if (rank is None) == (energy is None):
            raise ConfigError("--to LoRA takes --rank 8 or --energy 0.99, one of them")
        return kitout.LoRA(rank=rank, lora_bias=lora_bias) if rank else kitout.LoRA(energy=energy, lora_bias=lora_bias)
    if rank is not None or energy is not None or lora_bias:
        raise ConfigError(f"--rank, --energy and --lora-bias are LoRA's: write --to LoRA, found --to {form}")
    return kitout.PrefixTuning() if form == "PrefixTuning" else form


def name_for(out: Path, kit: Kit) -> str:
    """The new adapter's name: that of its folder, as far as a name can hold it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.resolve().name).lstrip("._-")[:100] or "fused"
    return next(each for each in (name, *(f"{name}-{i}" for i in range(2, 1000))) if each not in kit)


@torch.no_grad()
def logits(kit: Kit, route: object, model: nn.Module | None = None) -> Tensor:
    """On a few random rows. model: another one than the kit, for the same rows."""
    batch = dummy_batch(kit.base, ROWS)
    if batch is None:
        raise ConfigError("it is not known what this model takes, so the result cannot be compared with what was asked")
    with kit.use(route), eval_mode(kit.base, kit):
        output = kit(**batch) if model is None else model(**batch)
    found: Tensor = output["logits"] if "logits" in output else output[0]
    return found.double()


def finish(kit: Kit, fused: FusedAdapter, out: Path, expected: Callable[[Kit], Tensor]) -> None:
    """Writes the adapter, opens it again, prints what it holds; exit status 1 where it should be exact and is not."""
    name, residual = fused.name, fused.residual
    wanted = expected(kit)
    kit.save(name, out)
    kit.use(None)
    kit.remove(name)
    kit.load(out, name=name)
    difference = float((logits(kit, name) - wanted).abs().max())
    typer.echo(repr(fused))
    typer.echo(f"residual {residual.total:.3g}: what is lost of the change, by its norm")
    for role, share in residual.by_role.items():
        typer.echo(f"  {role:<12} {share:.3g}")
    if fused.dropped:
        kinds = list(fused.dropped.values())
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        typer.echo(f"left out and counted: {counts}")
    typer.echo(f"largest logit difference on {ROWS} sampled rows, opened again: {difference:.2e}")
    typer.echo(str(out))
    if residual.total <= EXACT and difference > TOLERANCE:
        typer.echo(f"error: nothing should be lost, and logits differ by more than {TOLERANCE:g}", err=True)
        raise typer.Exit(1)
