"""`kitout demo text`: a preset of `kitout train` that fine-tunes a small language model to name a text's label.

It turns the few options of the demo into a run's config and knows nothing else: data, training, evaluation and report
are those of every run. The learning rate was selected on 500 validation tweets, never the test tweets: 1e-3 gave 0.684,
2e-3 0.682.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.assets.catalog import ASSETS
from kitout.data.encode.classification import label_set
from kitout.data.read.sources import load_examples
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.run import Result, run

MODEL, DATA = "smollm2-135m", "tweets"
INSTRUCTION = "Classify the sentiment of this tweet as negative, neutral or positive."
NUM_TRAIN, NUM_TEST = 1280, 600
MAX_NEW_TOKENS = 12  # of a generated answer: enough to see whether it is a label


@dataclass(frozen=True, kw_only=True)
class TextDemo:
    """The options of the command line."""

    model: Path | None = None
    """A model folder; None: the built-in one."""
    data: Path | None = None
    """A table of texts and labels; None: the built-in tweets."""
    text: str | None = None
    """The column of the texts, if it is not obvious."""
    label: str | None = None
    """The column of the labels, if it is not obvious."""
    instruction: str | None = None
    """The system prompt; None: one that names the labels."""
    out: Path = Path("runs/demo-text")
    """The run folder."""
    train: int = NUM_TRAIN
    """Training examples, at most."""
    test: int | None = None
    """Test examples; None: in the same proportion to `train` as by default."""
    shown: int = 6
    """Test examples whose answers are printed."""
    dtype: str = "auto"
    """Of the frozen weights."""
    epochs: int = 1
    """Passes over the training examples."""
    lr: float = 1e-3
    """Learning rate."""
    seed: int = 0
    """Of the adapter's initial values and the order of examples."""


def preset(options: TextDemo) -> RunConfig:
    """The run that the options describe."""
    columns = {role: name for role, name in (("text", options.text), ("label", options.label)) if name is not None}
    num_test = options.test if options.test is not None else round(options.train * NUM_TEST / NUM_TRAIN)
    # how many rows a user's table has is not known: a fraction of it
    test = NUM_TEST / (NUM_TRAIN + NUM_TEST) if options.data is not None and options.test is None else num_test
    source: dict[str, Any] = {
        "path": str(options.data or DATA),
        "format": "label",
        "columns": columns,
        "limit": options.train + num_test,
        "system_prompt": options.instruction
        or (INSTRUCTION if options.data is None else _instruction_for(options.data, columns)),
    }
    return load(
        {
            "model": {"name": str(options.model or MODEL), "dtype": options.dtype},
            "method": {"name": "LoRA", "rank": 8, "alpha": 16, "targets": "all-linear"},
            "data": {"train": [source], "validation": 0, "test": test},
            "train": {
                "lr": options.lr,
                "weight_decay": 0.0,
                "epochs": options.epochs,
                "batch_size": 16,
                "warmup_ratio": 0.06,
                "max_grad_norm": 1.0,
                "seed": options.seed,
            },
            "evaluate": {
                "show_examples": options.shown,
                "max_test_examples": max(num_test, 1000),
                "max_new_tokens": MAX_NEW_TOKENS,
                "prove_merge": True,
            },
            "output": {"folder": options.out, "name": "demo"},
        }
    )


def demo(options: TextDemo, log: Callable[[str], None] = print) -> Result:
    """Runs it, and says what to do next."""
    result = run(preset(options), log=log)
    if options.model is None:
        log(f"note: {MODEL}: {ASSETS[MODEL].caveat}")
    log("next: the same on your own texts (columns text and label):\n  kitout demo text --data FILE.csv --model FOLDER")
    return result


def _instruction_for(data: Path, columns: dict[str, str]) -> str:
    """A system prompt that names the labels of a table."""
    splits = load_examples(str(data), "label", columns).splits.values()
    *first, last = label_set(example for split in splits for example in split)
    return f"Classify this text as {' or '.join([', '.join(first), last] if first else [last])}."
