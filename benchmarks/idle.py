"""(b) What adapters cost while they are off: the attached model with an inactive adapter, against the base unattached.

PEFT's disabled adapter is run beside it. One forward, 2 x 64 tokens, SmolLM2-135M shape, fp32, no gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Line, interleaved, smollm2
from peft import LoraConfig, get_peft_model
from torch import nn

import kitout
from kitout import LoRA


def run(rounds: int = 12) -> list[Line]:
    ids = torch.randint(0, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
    base = smollm2(torch.float32).eval()
    kit = kitout.attach(smollm2(torch.float32).eval())
    kit.add("a", LoRA(rank=8, targets="all-linear"))
    peer = get_peft_model(
        smollm2(torch.float32), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    peer.base_model.disable_adapter_layers()

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: model(input_ids=ids, use_cache=False)

    with torch.no_grad():
        times = interleaved({"base": forward(base), "off": forward(kit), "peft": forward(peer)}, rounds, calls=2)
    ratio = times.ratio("off", "base")
    detail = f"base {times.best('base') * 1e3:.0f} ms; PEFT disabled {times.ratio_text('peft', 'base')}"
    measured = times.ratio_text("off", "base")
    return [Line("attached but off, against the base alone", measured, "<= 1.005 x", ratio <= 1.005, detail)]
