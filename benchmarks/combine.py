"""(g) What fusing costs: the sum of 8 LoRAs of rank 16 at 64 matrices of 4096 x 4096, cut to rank 16, on one core.

The base has random values; nothing is run through it. `SITES` says how many matrices are taken: with fewer than 64 the
time is scaled up. One dense SVD of such a matrix is timed beside it with DENSE=1.
"""

from __future__ import annotations

import os
import time

import torch
from common import Line, one_thread
from torch import Tensor, nn

import kitout
from kitout import LoRA

WIDTH, RANK, ADAPTERS, ALL_SITES, TARGET_S = 4096, 16, 8, 64, 30.0


class Squares(nn.Module):
    """Blocks of four square projections; the weights are one block's, so that the base takes little memory."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(4)]
        self.layers = nn.ModuleList()
        for _ in range(blocks):
            block = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for n in "qkvo"})
            for linear, weight in zip(block.values(), weights, strict=True):
                linear.weight = weight
            self.layers.append(block)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (layer[name](x) for name in "qkv")
            x = x + layer["o"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x


def run(sites: int | None = None) -> list[Line]:
    sites = int(os.environ.get("SITES", ALL_SITES)) if sites is None else sites
    with one_thread():
        kit = kitout.attach(Squares(sites // 4), example_batch={"x": torch.randn(1, 2, WIDTH)})
        for i in range(ADAPTERS):
            adapter = kit.add(f"a{i}", LoRA(rank=RANK, targets="all-linear"), seed=i)
            with torch.no_grad():
                for delta in adapter.deltas.values():
                    delta.get_parameter("b").normal_()
        start = time.process_time()  # of one thread
        fused = kitout.combine(kit, "sum", {f"a{i}": 1.0 for i in range(ADAPTERS)}, to=LoRA(rank=RANK))
        seconds = time.process_time() - start
        detail = f"{len(kit['sum'].sites)} sites, residual {fused.residual.total:.3f}"
        if os.environ.get("DENSE"):
            matrix = torch.randn(WIDTH, WIDTH)
            start = time.perf_counter()
            torch.linalg.svd(matrix)
            detail += f", one dense SVD {time.perf_counter() - start:.0f} s"
    whole = seconds * ALL_SITES / sites
    measured = f"{seconds:.1f} s" if sites == ALL_SITES else f"{seconds:.2f} s for {sites}, {whole:.1f} s for 64"
    metric = "8 LoRAs r 16 at 64 sites of 4096 x 4096, summed and cut to r 16, one core"
    return [Line(metric, measured, f"<= {TARGET_S:.0f} s", whole <= TARGET_S, detail, value=whole)]
