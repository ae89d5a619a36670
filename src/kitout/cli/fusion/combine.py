"""`kitout combine ADAPTER=WEIGHT... --out DIR`: one adapter made of several, by arithmetic on what they change.

Only options and printing here; `kitout.combine` does the work, and `fused.py` proves what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import kitout
from kitout.cli.fusion.fused import finish, logits, name_for, result_form
from kitout.cli.terminal import report_errors
from kitout.errors import ConfigError
from kitout.kit import Kit


def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="adapter folders with weights; without: 1")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new or empty folder")],
    how: Annotated[str, typer.Option(help="sum, mean, ties, dare, dare-ties, della, ...: docs/fusion.md")] = "sum",
    to: Annotated[str, typer.Option(help="exact, dense or LoRA (with --rank or --energy)")] = "exact",
    rank: Annotated[int | None, typer.Option(help="of --to LoRA")] = None,
    energy: Annotated[float | None, typer.Option(help="of --to LoRA: the share that each site keeps")] = None,
    lora_bias: Annotated[bool, typer.Option("--lora-bias", help="of --to LoRA: it holds biases as well")] = False,
    density: Annotated[float | None, typer.Option(help="the share of values that stay")] = None,
    gamma: Annotated[float | None, typer.Option(help="of breadcrumbs")] = None,
    epsilon: Annotated[float | None, typer.Option(help="of della")] = None,
    lam: Annotated[float, typer.Option(help="a factor on the result")] = 1.0,
    seed: Annotated[int, typer.Option(help="of random draws")] = 0,
    drop: Annotated[str | None, typer.Option(help="what may be left out: 'biases norms other heads'")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="the base: a folder or a name; default: as the adapters say")
    ] = None,
    task: Annotated[str | None, typer.Option(help="of adapters that were not made by kitout train")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Make one adapter of several: a weighted sum, or one of ten other rules.

    The folder is opened again, and the largest logit difference and the residual by role are printed.

    Example: kitout combine --how ties --density 0.2 --to LoRA --rank 8 --out both runs/a/adapter=0.7 runs/b/adapter=0.3
    """
    with report_errors():
        folders, weights = zip(*map(parse_weight, adapters), strict=True)
        form = result_form(to, rank, energy, lora_bias)
        predictor = kitout.load(*folders, base=model, task=task, device=device, dtype="float32")
        kit, names = predictor.kit, predictor.loaded
        if len(names) != len(folders):
            raise ConfigError(f"one weight belongs to one adapter, and these folders hold {', '.join(names)}")
        by_name = dict(zip(names, weights, strict=True))
        options: dict[str, Any] = {
            "density": density,
            "lam": lam,
            "gamma": gamma,
            "epsilon": epsilon,
            "seed": seed,
            "drop": drop,
        }
        fused = kitout.combine(kit, name_for(out, kit), by_name, how=how, to=form, **options)

        def expected(kit: Kit) -> Tensor:
            """The sources in a Mix where the result is their sum; else the same combination, not cut."""
            has_heads = any(kit[name].heads for name in kit.names if name != fused.name)
            total = sum(by_name.values()) if how == "mean" else 1.0
            if how in ("sum", "mean") and not has_heads:
                return logits(kit, kitout.Mix({name: lam * w / total for name, w in by_name.items()}))
            if isinstance(form, str):
                return logits(kit, fused.name)
            whole = kitout.combine(kit, name_for(Path("whole"), kit), by_name, how=how, to="dense", **options)
            wanted = logits(kit, whole.name)
            kit.remove(whole.name)
            return wanted

        finish(kit, fused, out, expected)


def parse_weight(text: str) -> tuple[str, float]:
    """FOLDER=WEIGHT, or FOLDER at weight 1. A folder that exists under the whole text is that folder."""
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        raise ConfigError(f"{text!r}: write FOLDER=WEIGHT with a number, such as {folder}=0.5") from None
    if not torch.tensor(weight).isfinite():
        raise ConfigError(f"{text!r}: a weight is a finite number")
    return folder, weight
