"""(f) attach and add: what finding sites costs, and what adapters that are registered and not active cost.

On a 7B shape on the meta device, where there are no weights to read; on SmolLM2's shape with the probe's forwards; a
forward under one of 256 registered LoRAs against the same with no others. All in processor time, attach on one thread.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import Line, interleaved, one_thread, served, smollm2
from transformers import AutoModelForCausalLM, LlamaConfig

import kitout
from kitout import LoRA

REGISTERED = 256


def run(rounds: int = 5) -> list[Line]:
    return [meta(rounds), probed(rounds), registered(4 * rounds)]


def meta(rounds: int) -> Line:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    best = float("inf")
    for _ in range(rounds):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        start = time.process_time()
        kitout.attach(model).add("a", LoRA(rank=8, targets="all-linear"))
        best = min(best, time.process_time() - start)
    return Line("attach + add LoRA all-linear, 7B shape, meta", f"{best:.2f} s", "< 2 s", best < 2)


def probed(rounds: int) -> Line:
    model = smollm2(torch.float32)
    kitout.attach(model).detach()  # the first one imports
    seconds = []
    walls = []
    for _ in range(rounds):
        with one_thread():
            start = time.process_time()
            kit = kitout.attach(model)
            seconds.append(time.process_time() - start)
        kit.detach()
        start = time.perf_counter()
        kit = kitout.attach(model)
        walls.append(time.perf_counter() - start)
        kit.detach()
    best, median = min(seconds), statistics.median(seconds)
    measured = f"{best:.2f} s (median of rounds {median:.2f})"
    detail = f"one thread; on {torch.get_num_threads()} it takes {min(walls):.2f} s by the clock"
    return Line("attach on SmolLM2's shape, probe included, CPU s", measured, "<= 0.30 s", best <= 0.3, detail)


def registered(rounds: int) -> Line:
    kits = {1: kitout.attach(served()), REGISTERED: kitout.attach(served())}
    for count, kit in kits.items():
        for i in range(count):
            kit.add(f"a{i}", LoRA(rank=8, targets="attn.q attn.v"))
        kit.use("a0")
    ids = torch.randint(1, 4000, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cases = {str(count): lambda kit=kit: kit(input_ids=ids, use_cache=False) for count, kit in kits.items()}
        times = interleaved(cases, rounds, warm=3, calls=2, clock=time.process_time)
    ratio = times.ratio(str(REGISTERED), "1")
    metric = f"forward with {REGISTERED} LoRAs registered and one active, against one registered"
    return Line(metric, times.ratio_text(str(REGISTERED), "1"), "<= 1.01 x", ratio <= 1.01)
