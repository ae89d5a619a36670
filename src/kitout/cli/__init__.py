"""The command line: one verb per file, put together here.

A verb's file is imported when the verb is called or asked for its `--help`: the first page needs none of them, so it
loads neither torch nor transformers. This file knows the verbs' names and first lines, and nothing of what they do.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kitout.version import __version__

HELP = """Parameter-efficient fine-tuning: train small adapters on a frozen transformer.

Start with `kitout demo text`, then `kitout train --model MODEL --data FILE.csv --out FOLDER`."""

# Verb -> the first line of its help; `cli/VERB.py` ("_" for "-") holds a Typer `app`, or a function of the verb's name.
VERBS = {
    "advise": "List the finished runs nearest to a planned one: what they chose and what they gained over the base.",
    "align": "Train on preferences and rewards: reward models, DPO, ORPO, SimPO, KTO, GRPO, RLOO, PPO.",
    "assets": "List, fetch and locate the built-in models and data sets, for example: kitout assets get smollm2-135m "
    "tweets",
    "chat": "Chat with adapters, or with a model. /help lists what else a line can say.",
    "combine": "Make one adapter of several: a weighted sum, or one of ten other rules.",
    "compare": "Compare finished runs: metrics on the test split with intervals, trainable parameters, time, memory.",
    "convert": "Write an adapter in another form: as LoRA of a rank, as trained copies, a prompt as a prefix.",
    "demo": "Fine-tune and evaluate on a built-in model and data, in minutes: text (the default), vision or align.",
    "doctor": "Show versions, device, speed of dtypes, memory, cache and optional parts, and say what is wrong.",
    "eval": "Measure adapters against their base: quality on your data, forgetting, cost, each with intervals.",
    "export": "Write an adapter in the format of another library, which loads it again where it is installed.",
    "extract": "Write the difference of a fine-tuned model from its base as a LoRA.",
    "inspect": "Show where adapters can be placed in a model: sites by role, layer and width. Loads no weights.",
    "merge": "Merge adapters into their base and write a plain transformers folder, which needs no kitout.",
    "methods": "List the methods: what each trains, where, its learning rate and weight decay, whether it merges.",
    "predict": "Predict with an adapter: columns are added to a table, a text gets a line.",
    "probe-sites": "Show which linear sites matter for a run, from one pass over its data: gradients, inputs, ranks. "
    "Trains nothing.",
    "search": "Search where adapters go, which and how large, under a budget: many designs in shared batches, the best "
    "confirmed.",
    "train": "Train an adapter on your data, evaluate it against the base, write a report.",
}  # fmt: skip

FOLDERS = {
    "advise": "search.", "combine": "fusion.", "convert": "fusion.", "extract": "fusion.", "probe-sites": "search.",
    "search": "search.",
}  # fmt: skip
"""Verb -> the folder of its file, where it is not cli/ itself."""


class VerbGroup(TyperGroup):
    """The verbs by name: stand-ins with their first lines, each replaced by its file's command when it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, first_line in VERBS.items():
            self.add_command(TyperCommand(name, help=first_line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name in VERBS else command, rest


def load_verb(name: str) -> Any:
    """The command of a verb, from its file."""
    file = name.replace("-", "_")
    module = vars(importlib.import_module(f"kitout.cli.{FOLDERS.get(name, '')}{file}"))
    verb = module.get("app")
    if verb is None:
        verb = typer.Typer(add_completion=False)
        verb.command(context_settings=module.get("CONTEXT_SETTINGS"))(module[file])
    command = typer.main.get_command(verb)
    command.name, command.help = name, module.get("HELP", command.help)
    return command


app = typer.Typer(name="kitout", cls=VerbGroup, no_args_is_help=True)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"kitout {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What all verbs have in common."""


def main() -> None:
    """Entry point of the `kitout` script."""
    app()
