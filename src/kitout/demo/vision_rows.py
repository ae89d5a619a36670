"""The rows of the vision table: one method, the head its paper uses and the recipe it is trained by, each.

Settings come from the papers where they fit a small model; learning rates were found with benchmarks/vision_search.py
on a validation part of MNIST-5k, never on the test images, at the demo's own budget. It trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from kitout import SSF, VPT, AdaptFormer, BitFit, FullFineTuning, Kit, LoRA, PartialFineTuning
from kitout.data.read.tables import DataError
from kitout.errors import Faults, suggest
from kitout.method import Method
from kitout.train.setup import heads


@dataclass(frozen=True)
class Row:
    """head None: the method trains the model's own. decay: of matrices; nothing with one dimension decays."""

    key: str
    title: str
    method: Method
    lr: float
    head_lr: float
    head: Literal["linear", "batchnorm"] | None = "linear"
    decay: float = 1e-4

    def heads(self, kit: Kit, classes: int, seed: int) -> dict[str, nn.Module]:
        if self.head is None:
            return {}
        return (heads.linear if self.head == "linear" else heads.batchnorm)(kit, classes, seed)


HEAD = 3e-3  # of a fresh head, under every method

ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        Row("linear", "linear probe", PartialFineTuning(part="head"), 3e-3, 3e-3, head=None),
        Row("bitfit", "BitFit", BitFit(), 3e-3, HEAD, decay=0.0),
        Row("vpt-shallow", "VPT-shallow", VPT(length=10), 3e-2, HEAD),
        Row("vpt-deep", "VPT-deep", VPT(length=10, deep=True), 1e-2, HEAD),
        Row("ssf", "SSF", SSF(), 3e-3, HEAD, decay=0.0),
        Row("lora", "LoRA, rank 8", LoRA(rank=8), 1e-3, HEAD),
        Row("adaptformer", "AdaptFormer-64", AdaptFormer(), 1e-2, HEAD, head="batchnorm"),
        Row("full", "full fine-tuning", FullFineTuning(), 1e-5, HEAD),
    )
}


def chosen(words: Sequence[str]) -> list[Row]:
    """The rows of these keys in the table's order; none given: all."""
    faults = Faults(DataError, "--methods")
    for word in words:
        if word not in ROWS:
            faults.add(f"{word!r}; {suggest(word, ROWS)}")
    faults.raise_if_any()
    return [row for row in ROWS.values() if not words or row.key in words]
