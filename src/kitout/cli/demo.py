"""`kitout demo`: train, measure and show an adapter on a real small model, or on your own model folder and texts.

Only words here; `kitout.demo.text` does the work, a preset of `kitout train`. `kitout demo` alone is the same.
An interrupted run resumes when the same command is given again. `kitout demo vision` is the verb below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kitout.cli import vision

app = typer.Typer(name="demo", help="Train and measure an adapter in minutes, on real data.", add_completion=False)
app.command("vision")(vision.vision)


@app.command("text")
@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="model folder; default: SmolLM2-135M-Instruct")] = None,
    data: Annotated[Path | None, typer.Option(help=".jsonl, .json, .csv or .tsv; default: tweets")] = None,
    text: Annotated[str | None, typer.Option(help="column of the texts, if not obvious")] = None,
    label: Annotated[str | None, typer.Option(help="column of the labels, if not obvious")] = None,
    instruction: Annotated[str | None, typer.Option(help="the system turn; default: names the labels")] = None,
    out: Annotated[Path, typer.Option(help="the run's folder: adapter, report, metrics, checkpoints")] = Path(
        "runs/demo-text"
    ),
    train: Annotated[int, typer.Option(min=20, help="training examples, at most")] = 1280,
    test: Annotated[int | None, typer.Option(min=10, help="test examples; default: 600 to 1280 of train")] = None,
    shown: Annotated[int, typer.Option(min=0, help="examples shown side by side")] = 6,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="learning rate")] = 1e-3,
    seed: Annotated[int, typer.Option(help="of the adapter's start and the order of examples")] = 0,
    dtype: Annotated[str, typer.Option(help="of the frozen weights: auto, float32 or bfloat16")] = "auto",
) -> None:
    """Train and measure an adapter in minutes, on real texts: a preset of `kitout train`."""
    if context.invoked_subcommand:
        return
    from kitout.cli.train import _escape_unencodable
    from kitout.errors import KitoutError

    _escape_unencodable()
    try:
        from kitout.demo.text import TextDemo
        from kitout.demo.text import demo as run

        run(
            TextDemo(model, data, text, label, instruction, out, train, test, shown, dtype, epochs, lr, seed),
            typer.echo,
        )
    except KitoutError as wrong:
        typer.echo(f"error: {wrong}", err=True)
        raise typer.Exit(1) from wrong
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command resumes from the last checkpoint", err=True)
        raise typer.Exit(130) from None
