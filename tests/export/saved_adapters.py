"""Adapters in folders, moved off their start without any training, on bases of `tiny_models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import kitout
from kitout import Method

LOADERS = {
    "causal_lm": "AutoModelForCausalLM", "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification", "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
}  # fmt: skip


def saved(folder: Path, base: Path, task: str, method: Method, seed: int = 1, head: str = "", classes: int = 0) -> Path:
    """An adapter with a head of `classes` outputs, if a head's path is given."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    model = getattr(transformers, LOADERS[task]).from_pretrained(base, **kwargs)
    kit = kitout.attach(model).eval()
    heads = {}
    if head:
        old = model.get_submodule(head)
        heads = {head: nn.Linear(old.in_features, classes, bias=old.bias is not None)}
    adapter = kit.add("adapter", method, seed=seed, heads=heads)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    kit.save("adapter", folder)
    return folder
