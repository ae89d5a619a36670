"""(a) One LoRA training step against PEFT's and against the frozen floor, on SmolLM2-135M, all with the same loss.

A step is forward, backward and AdamW over the adapter. The floor is forward and backward to the embeddings with
nothing trained and no optimizer: what the frozen model costs by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Line, Times, interleaved, smollm2
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import kitout
from kitout import LoRA

CASES = {"2 x 128 fp32": (2, 128, torch.float32), "4 x 256 bf16": (4, 256, torch.bfloat16)}


def run(rounds: int = 8) -> list[Line]:
    lines = []
    for name, (rows, tokens, dtype) in CASES.items():
        times, losses = measure(rows, tokens, dtype, rounds)
        detail = ", ".join(f"{case} {times.best(case):.3f} s" for case in times.rounds) + "; "
        detail += f"losses {', '.join(f'{k} {v:.5f}' for k, v in losses.items())}"
        for to, limit in (("peft", 0.90), ("floor", 1.20)):
            ratio = times.ratio("kitout", to)
            label = f"LoRA r=8 all-linear step, {name}, against {'PEFT' if to == 'peft' else 'the floor'}"
            lines.append(Line(label, times.ratio_text("kitout", to), f"<= {limit:.2f} x", ratio <= limit, detail))
            detail = ""
    return lines


def measure(rows: int, tokens: int, dtype: torch.dtype, rounds: int) -> tuple[Times, dict[str, float]]:
    ids = torch.randint(0, 49152, (rows, tokens), generator=torch.Generator().manual_seed(0))
    base = smollm2(dtype).requires_grad_(False).train()
    peer = get_peft_model(
        smollm2(dtype), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    kit = kitout.attach(smollm2(dtype)).train()
    kit.add("a", LoRA(rank=8, alpha=16, targets="all-linear"))
    kit.use("a")
    same_values(peer, kit)

    def floor() -> float:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        loss = base(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss)

    cases = {
        "floor": floor,
        "peft": step(peer, [p for p in peer.parameters() if p.requires_grad], ids),
        "kitout": step(kit, list(kit["a"].parameters()), ids),
    }
    losses = {name: case() for name, case in cases.items()}
    return interleaved(cases, rounds, warm=0), losses


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
