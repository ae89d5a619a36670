"""(f) attach and add on a 7B-shaped model, on the meta device: what finding sites costs, without the weights."""

from __future__ import annotations

import time

import torch
from common import Line
from transformers import AutoModelForCausalLM, LlamaConfig

import kitout
from kitout import LoRA


def run(rounds: int = 3) -> list[Line]:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    best = float("inf")
    for _ in range(rounds):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        start = time.perf_counter()
        kitout.attach(model).add("a", LoRA(rank=8, targets="all-linear"))
        best = min(best, time.perf_counter() - start)
    return [Line("attach + add LoRA all-linear, 7B shape, meta", f"{best:.2f} s", "< 2 s", best < 2)]
