"""`kitout demo`: train, measure and show an adapter on a real small model, or on your own model folder and texts.

Only words here; `kitout.demo.run` does the work. A run that was interrupted goes on where it stopped when the same
command is given again. `kitout demo vision` is the verb below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kitout.cli import vision

app = typer.Typer(name="demo", help="Train and measure an adapter in minutes, on real data.", add_completion=False)
app.command("vision")(vision.vision)


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="model folder; default: SmolLM2-135M-Instruct")] = None,
    data: Annotated[Path | None, typer.Option(help=".jsonl, .json, .csv or .tsv; default: tweets")] = None,
    text: Annotated[str | None, typer.Option(help="column of the texts, if not obvious")] = None,
    label: Annotated[str | None, typer.Option(help="column of the labels, if not obvious")] = None,
    instruction: Annotated[str | None, typer.Option(help="what to tell the model; default: names the labels")] = None,
    out: Annotated[Path, typer.Option(help="where adapter, figures and checkpoint go")] = Path("runs/demo"),
    train: Annotated[int, typer.Option(min=20, help="texts to learn from, at most")] = 1280,
    test: Annotated[int, typer.Option(min=20, help="texts held out, at most")] = 600,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="learning rate")] = 1e-3,
    seed: Annotated[int, typer.Option(help="of the adapter's start and the order of the texts")] = 0,
    dtype: Annotated[str, typer.Option(help="of the frozen weights: auto, bf16 or fp32")] = "auto",
) -> None:
    """Train and measure an adapter in minutes, on real data."""
    if context.invoked_subcommand:
        return
    from kitout.demo.run import Options, run
    from kitout.demo.screen import Screen
    from kitout.demo.train import Settings
    from kitout.errors import KitoutError

    if dtype not in {"auto", "bf16", "fp32"}:
        raise typer.BadParameter(f"{dtype!r}: use auto, bf16 or fp32", param_hint="--dtype")
    settings = Settings(lr=lr, epochs=epochs, seed=seed)
    options = Options(model, data, text, label, instruction, out, train, test, dtype=dtype, settings=settings)
    try:
        run(options, Screen())
    except KitoutError as wrong:
        typer.echo(f"error: {wrong}", err=True)
        raise typer.Exit(1) from wrong
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
