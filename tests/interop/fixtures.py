"""What tests of other trainers share: rows of a specimen with labels, and arguments for a short run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import LABELS, Specimen

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""What every trainer of the tests is given."""


class LabeledRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of a specimen with labels: the text itself, or a class for each row."""

    def __init__(self, specimen: Specimen, number: int = 8, seed: int = 3) -> None:
        self.batch = dict(specimen.batch(number, seed))
        classes = torch.arange(number) % LABELS
        is_language_model = specimen.kind in ("decoder", "encoder-decoder")
        if specimen.kind == "encoder-decoder":
            self.batch["labels"] = self.batch.pop("decoder_input_ids")
        else:
            self.batch["labels"] = self.batch["input_ids"] if is_language_model else classes
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[i] for name, value in self.batch.items()}


def bits(kit: Any, name: str) -> list[Tensor]:
    """A copy of an adapter's values."""
    return [p.detach().clone() for p in kit[name].parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / f"checkpoint-{step}")
