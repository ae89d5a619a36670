"""What tests of stages run in processes of their own. It knows kits, heads and nothing of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kitout
from kitout import Kit
from kitout.align.roles import Answer, roles
from kitout.train.objectives.answer_rows import collate_rows
from train.fixtures import texts

torch.set_num_threads(1)


def scores(kit: Kit, adapter: str, answer: Answer) -> list[float]:
    """What a scalar head gives for some texts."""
    batch = collate_rows(texts(5, seed=2, low=5, high=30), kit.device)
    values: list[float] = roles(kit, batch, {adapter: answer})[adapter].tolist()
    return values


def scores_of_folder(model: Path, folder: Path, answer: Answer, attention: str) -> list[float]:
    """The same of an adapter's folder on its base."""
    base: Any = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention)
    kit = kitout.attach(base)
    kit.load(folder, name="judge")
    return scores(kit, "judge", answer)
