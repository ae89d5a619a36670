"""(a) One LoRA training step against PEFT's and against the frozen floor, on SmolLM2-135M, all with the same loss.

A step is forward, backward and AdamW over the adapter. The floor is forward and backward to the embeddings with
nothing trained and no optimizer: what the frozen model costs by itself. Memory is the peak of what a step allocates,
with the model, the adapter's own gradients left out.

`python benchmarks/train_step.py --blocks 6` is the quick check: fewer blocks and as much less of the vocabulary, so
that the shares stay; without PEFT.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from common import SMOL, Line, interleaved, smollm2
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kitout
from kitout import LoRA

CASES = {"2 x 128 fp32": (2, 128, torch.float32), "4 x 256 bf16": (4, 256, torch.bfloat16)}


LIMITS = {"peft": 0.90, "floor": 1.06}
MEMORY_LIMIT = 1.05


def run(rounds: int = 8, blocks: int = SMOL.num_hidden_layers) -> list[Line]:
    lines = []
    for name, (rows, tokens, dtype) in CASES.items():
        cases, model_bytes, gradient_bytes = build(rows, tokens, dtype, blocks)
        losses = {case: call() for case, call in cases.items()}
        times = interleaved(cases, rounds, warm=0)
        detail = ", ".join(f"{case} {times.best(case):.3f} s" for case in times.rounds) + "; "
        detail += f"losses {', '.join(f'{k} {v:.5f}' for k, v in losses.items())}"
        for to, limit in LIMITS.items():
            if to in cases:
                ratio = times.ratio("kitout", to)
                label = f"LoRA r=8 all-linear step, {name}, against {'PEFT' if to == 'peft' else 'the floor'}"
                lines.append(Line(label, times.ratio_text("kitout", to), f"<= {limit:.2f} x", ratio <= limit, detail))
                detail = ""
        lines.append(memory_line(name, cases, model_bytes, gradient_bytes))
    return lines


def memory_line(name: str, cases: dict[str, Callable[[], float]], model_bytes: int, gradient_bytes: int) -> Line:
    floor, kitout_peak = (model_bytes + peak_bytes(cases[case]) for case in ("floor", "kitout"))
    ratio = (kitout_peak - gradient_bytes) / floor
    detail = f"floor {floor / 2**20:.0f} MiB, of them the model {model_bytes / 2**20:.0f}"
    label = f"LoRA r=8 all-linear step, {name}, peak memory against the floor"
    return Line(label, f"{ratio:.3f} x", f"<= {MEMORY_LIMIT:.2f} x", ratio <= MEMORY_LIMIT, detail)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call holds at once of what it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = highest = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def build(rows: int, tokens: int, dtype: torch.dtype, blocks: int) -> tuple[dict[str, Callable[[], float]], int, int]:
    """The cases, and the bytes of the model and of the adapter's gradients."""
    base = smollm2(dtype, blocks).requires_grad_(False).train()
    ids = torch.randint(0, base.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    kit = kitout.attach(smollm2(dtype, blocks)).train()
    kit.add("a", LoRA(rank=8, alpha=16, targets="all-linear"))
    kit.use("a")

    def floor() -> float:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        loss = base(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss)

    cases = {"floor": floor}
    if blocks == SMOL.num_hidden_layers:
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        peer = get_peft_model(smollm2(dtype), config).train()
        same_values(peer, kit)
        cases["peft"] = step(peer, [p for p in peer.parameters() if p.requires_grad], ids)
    trained = list(kit["a"].parameters())
    cases["kitout"] = step(kit, trained, ids)
    return cases, bytes_of(base.parameters()), bytes_of(trained)


def bytes_of(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def step(
    model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, labels: Tensor | None = None
) -> Callable[[], float]:
    """labels: default every token."""
    targets = ids if labels is None else labels
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def run_once() -> float:
        loss = model(input_ids=ids, labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return run_once


@torch.no_grad()
def same_values(peer: nn.Module, kit: kitout.Kit) -> None:
    """Both start from PEFT's A and B."""
    values = dict(peer.named_parameters())
    for site in kit["a"].sites:
        delta = kit["a"].delta(site)
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
            delta.get_parameter(ours).copy_(values[f"base_model.model.{site.path}.{theirs}.default.weight"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=SMOL.num_hidden_layers)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    for line in run(options.rounds, options.blocks):
        print(
            f"{'yes' if line.reached else 'NO':>3} {line.metric}: {line.measured} (target {line.target}) {line.detail}"
        )
