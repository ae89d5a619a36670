"""What an adapter costs to run: trainable parameters, bytes of its file, milliseconds per token with and without it.

Prefill (a prompt of 128 tokens) and decoding (one token after another) are timed apart, base and adapters in turn in
one process, and each with the best of a few rounds; merged where the adapter merges. What training took stands in the
run's own results. It knows kits, and no data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from transformers import GenerationMixin

from kitout.base.eval_mode import eval_mode
from kitout.errors import KitoutError
from kitout.evaluate.compare import BASE
from kitout.format import format_bytes, format_count
from kitout.kit import Kit
from kitout.route import RouteEntry, adapter_names

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 16, 3


@dataclass(frozen=True)
class AdapterCost:
    """Of one adapter, or of the base. (The names are keys of results.json.)"""

    HEAD: ClassVar[tuple[str, ...]] = (
        "", "parameters", "bytes", "prefill ms/token", "decoding ms/token", "merged: prefill", "merged: decoding",
    )  # fmt: skip

    parameters: int
    """Of the adapter and its parts."""
    bytes: int
    """Of their values."""
    prefill: float
    """Milliseconds per token of a prompt."""
    decoding: float | None
    """Milliseconds per token that is written; None: it writes no text."""
    merged_prefill: float | None = None
    """The same after merging; None: it does not merge."""
    merged_decoding: float | None = None
    """The same after merging."""

    def row(self, name: str) -> tuple[str, ...]:
        """For a table."""
        times = (self.prefill, self.decoding, self.merged_prefill, self.merged_decoding)
        return name, format_count(self.parameters), format_bytes(self.bytes), *(
            "" if one is None else f"{one:.2f}" for one in times
        )  # fmt: skip


def measure_cost(kit: Kit, routes: Mapping[str, RouteEntry]) -> dict[str, AdapterCost]:
    """Of the base and of each route, interleaved. The kit is left without a merged adapter, and with none active."""
    ids = torch.randint(1, 100, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(kit.device)
    decodes = isinstance(kit.base, GenerationMixin) and not kit.config.is_encoder_decoder
    cases: dict[str, RouteEntry] = {BASE: None, **routes}
    with eval_mode(kit.base, kit), torch.no_grad():
        times = _time({name: partial(kit.use, route) for name, route in cases.items()}, kit, ids, decodes)
        merged: dict[str, tuple[float, float | None]] = {}
        for name, route in routes.items():
            try:
                kit.use(None)
                kit.merge(route)
            except KitoutError:
                continue
            try:
                merged |= _time({name: lambda: None}, kit, ids, decodes)
            finally:
                kit.unmerge()
    costs = {}
    for name, route in cases.items():
        parts = kit.state.names_with_parts(adapter_names(route))
        tensors = [p for part in parts for p in kit[part].parameters()]
        costs[name] = AdapterCost(
            sum(p.numel() for p in tensors),
            sum(p.numel() * p.element_size() for p in tensors),
            *times[name],
            *merged.get(name, (None, None)),
        )
    return costs


def _time(
    cases: Mapping[str, Callable[[], object]], kit: Kit, ids: torch.Tensor, decodes: bool
) -> dict[str, tuple[float, float | None]]:
    """Milliseconds per token: the best round of each."""
    best: dict[str, list[float]] = {name: [] for name in cases}
    decoding: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, activate in cases.items():
            activate()
            start = time.perf_counter()
            kit(input_ids=ids)
            best[name].append((time.perf_counter() - start) * 1e3 / PROMPT_TOKENS)
            if decodes:
                seconds = []
                for number in (1, 1 + NEW_TOKENS):
                    start = time.perf_counter()
                    kit.generate(ids, max_new_tokens=number, min_new_tokens=number, do_sample=False, pad_token_id=0)
                    seconds.append(time.perf_counter() - start)
                decoding[name].append((seconds[1] - seconds[0]) * 1e3 / NEW_TOKENS)
    return {name: (min(best[name]), min(decoding[name]) if decodes else None) for name in cases}
