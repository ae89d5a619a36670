"""`kitout demo text`: a preset of `kitout train`, an adapter on a real small model and real tweets, or on your own.

It turns the few flags of the demo into a run's config and knows nothing else: data, training, evaluation and report are
those of every run. The rate was chosen on 500 validation tweets, never the test tweets: 1e-3 gave 0.684, 2e-3 0.682.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.assets.catalog import ASSETS
from kitout.data.encode.classification import label_set
from kitout.data.read.sources import load_examples
from kitout.train.config.load import load as checked
from kitout.train.config.schema import RunConfig
from kitout.train.run import Result, run

MODEL, DATA = "smollm2-135m", "tweets"
INSTRUCTION = "Classify the sentiment of this tweet as negative, neutral or positive."
TRAIN, TEST = 1280, 600
LONGEST = 12  # tokens of a written answer: enough to see whether it is a label


@dataclass(frozen=True)
class TextDemo:
    """What the command line can change."""

    model: Path | None = None
    """A model folder; None: the built-in one."""
    data: Path | None = None
    """A table of texts and labels; None: the built-in tweets."""
    text: str | None = None
    """The column of the texts, if it is not found."""
    label: str | None = None
    """The column of the labels, if it is not found."""
    instruction: str | None = None
    """The system turn; None: one that names the labels."""
    out: Path = Path("runs/demo-text")
    """The run's folder."""
    train: int = TRAIN
    """Training examples, at most."""
    test: int | None = None
    """Test examples; None: in the same proportion to train as by default."""
    shown: int = 6
    """Examples shown side by side."""
    dtype: str = "auto"
    """Of the frozen weights."""
    epochs: int = 1
    """Passes over the training examples."""
    lr: float = 1e-3
    """Learning rate."""
    seed: int = 0
    """Of the adapter's start and the order of examples."""


def preset(chosen: TextDemo) -> RunConfig:
    """The run that the flags describe."""
    named = {"text": chosen.text, "label": chosen.label}
    columns = {role: column for role, column in named.items() if column is not None}
    instruction = chosen.instruction or (INSTRUCTION if chosen.data is None else _naming(chosen.data, columns))
    number = chosen.test if chosen.test is not None else round(chosen.train * TEST / TRAIN)
    own = chosen.data is not None and chosen.test is None  # how many rows an own table has is not known: a share
    source: dict[str, Any] = {
        "path": str(chosen.data or DATA),
        "format": "label",
        "columns": columns,
        "limit": chosen.train + number,
    }
    return checked(
        {
            "model": {"name": str(chosen.model or MODEL), "dtype": chosen.dtype},
            "method": {"name": "LoRA", "rank": 8, "alpha": 16, "targets": "all-linear"},
            "data": {
                "train": [source | {"system_prompt": instruction}],
                "validation": 0,
                "test": TEST / (TRAIN + TEST) if own else number,
            },
            "train": {
                "lr": chosen.lr,
                "weight_decay": 0.0,
                "epochs": chosen.epochs,
                "batch_size": 16,
                "warmup_ratio": 0.06,
                "max_grad_norm": 1.0,
                "seed": chosen.seed,
            },
            "evaluate": {
                "show_examples": chosen.shown,
                "max_test_examples": max(number, 1000),
                "max_new_tokens": LONGEST,
                "prove_merge": True,
            },
            "output": {"folder": chosen.out, "name": "demo"},
        }
    )


def demo(chosen: TextDemo, say: Callable[[str], None] = print) -> Result:
    """Runs it, and says what to do next."""
    result = run(preset(chosen), log=say)
    if chosen.model is None:
        say(f"note: {MODEL}: {ASSETS[MODEL].caveat}")
    say("next: the same on your own texts (columns text and label):\n  kitout demo text --data FILE.csv --model FOLDER")
    return result


def _naming(data: Path, columns: dict[str, str]) -> str:
    """An instruction that names the labels of a table."""
    found = load_examples(str(data), "label", columns)
    return f"Classify this text as {_listed(label_set(e for part in found.splits.values() for e in part))}."


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
