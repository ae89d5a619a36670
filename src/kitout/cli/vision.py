"""`kitout demo vision`: many methods side by side on one image model, the same images and budget for each.

Only words here; `kitout.demo.vision` is a preset of `kitout train`. An interrupted run goes on from its last checkpoint
when the same command is given again; another comparison needs another --out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def vision(
    model: Annotated[Path | None, typer.Option(help="model folder; default: DINOv2-small")] = None,
    data: Annotated[
        Path | None, typer.Option(help="folder of class folders, .csv .tsv .jsonl .parquet or .npz; default: MNIST-5k")
    ] = None,
    image: Annotated[str | None, typer.Option(help="column of the image paths, if not obvious")] = None,
    label: Annotated[str | None, typer.Option(help="column of the labels, if not obvious")] = None,
    methods: Annotated[str, typer.Option(help="some of the methods, by commas; default: all")] = "",
    out: Annotated[Path, typer.Option(help="where adapters, report and checkpoints go")] = Path("runs/vision"),
    size: Annotated[int | None, typer.Option(min=1, help="side of the square the model sees, in pixels")] = None,
    train: Annotated[int, typer.Option(min=2, help="images to learn from, at most")] = 500,
    test: Annotated[int, typer.Option(min=1, help="images held out, at most")] = 1000,
    budget: Annotated[int, typer.Option(min=1, help="images shown to each method in training, repeats counted")] = 1500,
    seed: Annotated[int, typer.Option(help="of the split, the adapters' start and the order of the images")] = 0,
) -> None:
    """VPT, AdaptFormer, SSF, LoRA, BitFit, linear probe and full fine-tuning side by side on your images."""
    from kitout.errors import KitoutError

    try:
        from kitout.demo.vision import config, demo

        names = [name.strip() for name in methods.split(",") if name.strip()]
        chosen = config(
            model=model, data=data, image=image, label=label, methods=names, out=out, size=size, train=train,
            test=test, budget=budget, seed=seed,
        )  # fmt: skip
        demo(chosen, typer.echo)
    except KitoutError as wrong:
        typer.echo(f"error: {wrong}", err=True)
        raise typer.Exit(1) from wrong
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
