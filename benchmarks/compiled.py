"""(i) A LoRA training step over compiled blocks against the frozen floor, eager and compiled, on SmolLM2-135M's shape.

A step is forward, backward and AdamW, whole logits; the floor is forward and backward of the frozen model to its
embeddings. Compiling comes before the rounds and is printed beside them: it is what a run pays first.
`python benchmarks/compiled.py [fp32 | bf16] [number of blocks] [rounds]` runs a part.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import torch
from common import SMOL, Line, interleaved, smollm2

import kitout

CASES = {"fp32": (2, 128, torch.float32), "bf16": (4, 256, torch.bfloat16)}
BOUNDS = {"eager floor": 0.97, "compiled floor": 1.08}


def run(rounds: int = 5, layers: int = SMOL.num_hidden_layers) -> Iterator[Line]:
    for name in CASES:
        yield from measure(name, layers, rounds)


def measure(name: str, layers: int, rounds: int) -> Iterator[Line]:
    rows, tokens, dtype = CASES[name]
    cases: dict[str, Callable[[], float]] = {}
    seconds: dict[str, float] = {}
    for how in ("eager", "compiled"):
        for what, make in (("floor", floor), ("step", lora_step)):
            base = smollm2(dtype, layers)
            ids = torch.randint(0, base.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
            kit = kitout.attach(base).train()
            case = make(kit, ids)
            if how == "compiled":
                kitout.compile(kit)
            start = time.perf_counter()
            case()
            seconds[f"{how} {what}"] = time.perf_counter() - start
            cases[f"{how} {what}"] = case
    losses = {case: run_once() for case, run_once in cases.items()}
    times = interleaved(cases, rounds, warm=0)
    detail = ", ".join(f"{case} {times.best(case):.3f} s, first {seconds[case]:.0f} s" for case in cases)
    detail += f"; losses {', '.join(f'{value:.5f}' for value in losses.values())}; {layers} blocks"
    for to, limit in BOUNDS.items():
        ratio = times.ratio("compiled step", to)
        label = f"LoRA r=8 all-linear step over compiled blocks, {rows} x {tokens} {name}, against the {to}"
        yield Line(label, times.ratio_text("compiled step", to), f"<= {limit:.2f} x", ratio <= limit, detail)
        detail = f"eager step {times.ratio_text('eager step', to)}"


def floor(kit: kitout.Kit, ids: torch.Tensor) -> Callable[[], float]:
    def run_once() -> float:
        embedded = kit.base.get_input_embeddings()(ids).detach().requires_grad_()
        loss = kit.base(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    return run_once


def lora_step(kit: kitout.Kit, ids: torch.Tensor) -> Callable[[], float]:
    adapter = kit.add("a", kitout.LoRA(rank=8, alpha=16, targets="all-linear"), seed=0)
    kit.use("a")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)

    def run_once() -> float:
        loss = kit(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run_once


if __name__ == "__main__":
    chosen = [sys.argv[1]] if len(sys.argv) > 1 else list(CASES)
    numbers = [int(word) for word in sys.argv[2:]]
    for each in chosen:
        for line in measure(each, numbers[0] if numbers else SMOL.num_hidden_layers, numbers[1] if numbers[1:] else 5):
            print(f"{line.metric}\n  {line.measured} (asked {line.target})\n  {line.detail}")
