"""`kitout demo text | vision | align`: train and evaluate adapters on a built-in model and data, or on your own.

Only options here; the modules of `kitout.demo` are presets of `kitout train` and `kitout align`. `kitout demo` alone is
`kitout demo text`. An interrupted run resumes when the same command is given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kitout.cli.terminal import announce_loading, report_errors, report_interrupt

HELP = """Fine-tune and evaluate on a built-in model and data, in minutes: text (the default), vision or align.

Example: kitout demo text --data reviews.csv --text body --label stars"""

app = typer.Typer(name="demo", add_completion=False)

OutFolder = Annotated[Path, typer.Option(help="run folder: adapter, report, metrics, checkpoints")]


@app.command("text")
@app.callback(invoke_without_command=True)
def text_demo(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="model folder; default: built-in SmolLM2-135M-Instruct")] = None,
    data: Annotated[Path | None, typer.Option(help=".jsonl, .json, .csv or .tsv; default: built-in tweets")] = None,
    text: Annotated[str | None, typer.Option(help="column of the texts, if not obvious")] = None,
    label: Annotated[str | None, typer.Option(help="column of the labels, if not obvious")] = None,
    instruction: Annotated[str | None, typer.Option(help="system prompt; default: one that names the labels")] = None,
    out: OutFolder = Path("runs/demo-text"),
    train: Annotated[int, typer.Option(min=20, help="training examples, at most")] = 1280,
    test: Annotated[int | None, typer.Option(min=10, help="test examples; default: 600 per 1280 of --train")] = None,
    shown: Annotated[int, typer.Option(min=0, help="test examples whose answers are printed")] = 6,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training examples")] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="learning rate")] = 1e-3,
    seed: Annotated[int, typer.Option(help="of the adapter's initial values and the order of examples")] = 0,
    dtype: Annotated[str, typer.Option(help="of the frozen weights: auto, float32 or bfloat16")] = "auto",
) -> None:
    """Fine-tune a small language model with LoRA and compare it with the base; a preset of `kitout train`.

    Example: kitout demo text --data reviews.csv --text body --label stars
    """
    if context.invoked_subcommand:
        return
    with report_errors(), report_interrupt():
        announce_loading()
        from kitout.demo.text import TextDemo, demo

        demo(
            TextDemo(
                model=model, data=data, text=text, label=label, instruction=instruction, out=out, train=train,
                test=test, shown=shown, dtype=dtype, epochs=epochs, lr=lr, seed=seed,
            ),
            typer.echo,
        )  # fmt: skip


@app.command("vision")
def vision_demo(
    model: Annotated[Path | None, typer.Option(help="model folder; default: built-in DINOv2-small")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="folder of class folders, .csv, .tsv, .jsonl, .parquet or .npz; default: built-in MNIST-5k"),
    ] = None,
    image: Annotated[str | None, typer.Option(help="column of the image paths, if not obvious")] = None,
    label: Annotated[str | None, typer.Option(help="column of the labels, if not obvious")] = None,
    methods: Annotated[str, typer.Option(help="some of the methods, separated by commas; default: all")] = "",
    out: OutFolder = Path("runs/vision"),
    size: Annotated[int | None, typer.Option(min=1, help="height and width of the model's input, in pixels")] = None,
    train: Annotated[int, typer.Option(min=2, help="training images, at most")] = 500,
    test: Annotated[int, typer.Option(min=1, help="test images, at most")] = 1000,
    budget: Annotated[int, typer.Option(min=1, help="training images shown to each method, repeats counted")] = 1500,
    seed: Annotated[int, typer.Option(help="of the split, the initial values and the order of images")] = 0,
) -> None:
    """Compare VPT, AdaptFormer, SSF, LoRA, BitFit, a linear probe and full fine-tuning on the same images.

    Example: kitout demo vision --data FOLDER_OF_CLASS_FOLDERS --methods linear,lora
    """
    with report_errors(), report_interrupt():
        announce_loading()
        from kitout.demo.vision import VisionDemo, demo

        names = tuple(name.strip() for name in methods.split(",") if name.strip())
        demo(
            VisionDemo(
                model=model, data=data, image=image, label=label, methods=names, out=out, size=size, train=train,
                test=test, budget=budget, seed=seed,
            ),
            typer.echo,
        )  # fmt: skip


@app.command("align")
def align_demo(
    model: Annotated[Path | None, typer.Option(help="model folder; default: built-in SmolLM2-135M-Instruct")] = None,
    task: Annotated[
        str, typer.Option(metavar="gym:NAME[:SETTING=VALUE...]", help="sums to learn: a task of reasoning-gym")
    ] = "gym:chain_sum:max_terms=2:max_digits=2",
    pairs: Annotated[
        Path | None, typer.Option(help="table of prompt, chosen and rejected; default: built-in nq-pairs")
    ] = None,
    elsewhere: Annotated[
        str, typer.Option(help="sets that show what was forgotten, separated by commas; empty: none")
    ] = "piqa,wiki",
    out: Annotated[Path, typer.Option(help="holds a folder for each stage")] = Path("runs/demo-align"),
    scale: Annotated[float, typer.Option(min=0.01, help="multiplies all numbers of steps and examples")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="of splits, initial values, order and sampled answers")] = 0,
) -> None:
    """Teach sums by answers, then by rewards; a reward model and DPO on pairs; a preset of `kitout align`.

    Needs reasoning-gym (the extra align). Example: kitout demo align --scale 0.5 --out runs/small
    """
    with report_errors(), report_interrupt():
        announce_loading()
        from kitout.demo.align import AlignDemo, demo

        names = tuple(name.strip() for name in elsewhere.split(",") if name.strip())
        demo(
            AlignDemo(model=model, task=task, pairs=pairs, elsewhere=names, out=out, scale=scale, seed=seed),
            typer.echo,
        )
