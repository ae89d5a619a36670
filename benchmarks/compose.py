"""(f) What compositions cost: a Stack and a Mix of two LoRAs of rank 8 against one LoRA of rank 16.

4 x 64 tokens, the 29.5 M Llama, all-linear, fp32: one forward without gradients, and one with its backward. The LoRA
of rank 16 is the Stack, so that both compute the same, and the largest difference is shown.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Line, interleaved, served
from torch import Tensor

import kitout
from kitout import Kit, LoRA, Mix, Stack

TARGETS = "all-linear"
LIMIT = 1.10
ROUTES = {"one": "one", "stack": Stack("a", "b"), "mix": Mix({"a": 0.5, "b": 0.3})}


def run(rounds: int = 12) -> list[Line]:
    kit = filled()
    ids = torch.randint(1, 4000, (4, 64), generator=torch.Generator().manual_seed(0))
    lines = []
    for kind, call in (("forward", forward), ("forward and backward", step)):
        cases = {name: call(kit, route, ids) for name, route in ROUTES.items()}
        if call is forward:
            cases["off"] = call(kit, None, ids)
        times = interleaved(cases, rounds, warm=2)
        detail = ", ".join(f"{case} {times.best(case) * 1e3:.1f} ms" for case in times.rounds)
        detail += f"; Stack and one differ by {difference(kit, ids):.0e} of logits"
        for name in ("stack", "mix"):
            label = f"{name.capitalize()} of two LoRAs r=8, {kind}, against one r=16"
            ratio = times.ratio(name, "one")
            lines.append(Line(label, times.ratio_text(name, "one"), f"<= {LIMIT:.2f} x", ratio <= LIMIT, detail))
            detail = ""
    return lines


@torch.no_grad()
def filled() -> Kit:
    """Two adapters of rank 8, and one of rank 16 that is their sum."""
    kit = kitout.attach(served())
    for name, rank in (("a", 8), ("b", 8), ("one", 16)):
        kit.add(name, LoRA(rank=rank, targets=TARGETS), seed=0)
    for name in ("a", "b"):
        for p in kit[name].parameters():
            p.normal_(0.0, 0.05)
    for site in kit["one"].sites:
        parts = [kit[name].delta(site) for name in ("a", "b")]
        whole = kit["one"].delta(site)
        whole.get_parameter("a").copy_(torch.cat([part.get_parameter("a") for part in parts]))
        whole.get_parameter("b").copy_(torch.cat([part.get_parameter("b") for part in parts], 1))
    return kit.eval()


def forward(kit: Kit, route: object, ids: Tensor) -> Callable[[], object]:
    def call() -> object:
        kit.use(route)
        with torch.no_grad():
            return kit(input_ids=ids, use_cache=False)

    return call


def step(kit: Kit, route: object, ids: Tensor) -> Callable[[], object]:
    def call() -> object:
        kit.use(route)
        loss = kit(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        kit.zero_grad(set_to_none=True)
        return loss

    return call


@torch.no_grad()
def difference(kit: Kit, ids: Tensor) -> float:
    """The largest one, against the largest logit."""
    logits = []
    for name in ("one", "stack"):
        with kit.use(ROUTES[name]):
            logits.append(kit(input_ids=ids, use_cache=False).logits)
    return float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
