"""What an adapter costs: its parameters and files, its training, and milliseconds per token with and without it.

Prefill (a prompt of 128 tokens, or of as many as the model reads; else an image) and decoding (one token after another)
are timed apart, base and adapters in turn in one process, each with the best of a few rounds; merged where the adapter
merges. What training took is read from its run (`training_cost`). It knows kits, and no data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import GenerationMixin

from kitout.assess.training_cost import TrainingCost, folder_bytes, read_training_cost
from kitout.base.eval_mode import eval_mode
from kitout.base.probe.dummy_batch import dummy_batch
from kitout.base.token_limit import long_batch
from kitout.errors import KitoutError
from kitout.evaluate.ask.text_limit import max_tokens
from kitout.evaluate.compare import BASE
from kitout.format import format_bytes, format_count
from kitout.kit import Kit
from kitout.route import RouteEntry, adapter_names

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 16, 3
MOST_ROUNDS, SECONDS_PER_CASE = 25, 0.3  # of a comparison by which designs are refused
Times = tuple[float | None, float | None]  # prefill, decoding


@dataclass(frozen=True)
class AdapterCost:
    """Of one adapter, or of the base. (The names are keys of results.json.)"""

    HEAD: ClassVar[tuple[str, ...]] = (
        "", "parameters", "bytes", "files", "training s", "training tokens", "training memory", "prefill ms/token",
        "decoding ms/token", "merged: prefill", "merged: decoding",
    )  # fmt: skip

    parameters: int
    """Of the adapter and its parts."""
    bytes: int
    """Of their values."""
    prefill: float | None
    """Milliseconds per token of a prompt, or per image; None: it is not known what the model reads."""
    decoding: float | None
    """Milliseconds per token that is written; None: it writes no text."""
    merged_prefill: float | None = None
    """The same after merging; None: it does not merge."""
    merged_decoding: float | None = None
    """The same after merging."""
    unit: str = "token"
    """What a prefill is counted by: token, or image."""
    files: int | None = None
    """Bytes of all files in the adapter's folder; None: it was not loaded from one."""
    training: TrainingCost | None = None
    """What its run says of its training; None: of the base."""

    def head(self) -> tuple[str, ...]:
        """Of a table of rows."""
        return tuple(
            title.replace("prefill ms/token", f"prefill ms/{self.unit}").replace("training tokens", f"training {unit}")
            for unit in ["images" if self.unit == "image" else "tokens"]
            for title in self.HEAD
        )

    def row(self, name: str) -> tuple[str, ...]:
        """For a table. What is not known is blank."""
        trained = self.training or TrainingCost()
        times = (self.prefill, self.decoding, self.merged_prefill, self.merged_decoding)
        return (
            name,
            format_count(self.parameters),
            format_bytes(self.bytes),
            "" if self.files is None else format_bytes(self.files),
            "" if trained.seconds is None else f"{trained.seconds:.1f}",
            "" if trained.amount is None else f"{trained.amount:,}",
            "" if trained.memory is None else format_bytes(trained.memory),
            *("" if one is None else f"{one:.2f}" for one in times),
        )


def cost_notes(costs: Mapping[str, AdapterCost]) -> list[str]:
    """What the table does not say: why something is blank, and what is shared by several adapters."""
    trained = {name: one.training for name, one in costs.items() if one.training is not None}
    notes = [f"training of {name} is not known: {one.unknown}" for name, one in trained.items() if one.unknown]
    joint = [f"{name} ({one.num_adapters})" for name, one in trained.items() if one.num_adapters > 1]
    if joint:
        notes.append(
            f"trained together with others: {', '.join(joint)}; seconds and {next(iter(trained.values())).unit} are "
            "each one's own share, the memory is the whole run's"
        )
    return notes


def measure_cost(
    kit: Kit, routes: Mapping[str, RouteEntry], folders: Mapping[str, Path] | None = None
) -> dict[str, AdapterCost]:  # fmt: skip
    """Of the base and of each route, interleaved. The kit is left without a merged adapter, and with none active.

    folders: by adapter the folder that it was loaded from.
    """
    cases: dict[str, RouteEntry] = {BASE: None, **routes}
    times: dict[str, Times] = dict.fromkeys(cases, (None, None))
    merged: dict[str, Times] = {}
    with eval_mode(kit.base, kit), torch.no_grad():
        batch, tokens = _batch(kit, list(cases.values()))
        if batch is not None:
            times = _time({name: partial(kit.use, route) for name, route in cases.items()}, kit, batch, tokens)
        for name, route in routes.items() if batch is not None else ():
            try:
                kit.use(None)
                kit.merge(route)
            except KitoutError:
                continue
            try:
                merged |= _time({name: lambda: None}, kit, batch, tokens)
            finally:
                kit.unmerge()
    costs = {}
    for name, route in cases.items():
        parts = kit.state.names_with_parts(adapter_names(route))
        tensors = [p for part in parts for p in kit[part].parameters()]
        own = [(folders or {}).get(each) for each in adapter_names(route)]
        known = {folder.resolve() for folder in own if folder is not None}
        costs[name] = AdapterCost(
            sum(p.numel() for p in tensors),
            sum(p.numel() * p.element_size() for p in tensors),
            *times[name],
            *merged.get(name, (None, None)),
            unit="token" if tokens > 1 else "image",
            files=sum(map(folder_bytes, known)) if own and None not in own else None,
            training=_training(own) if own else None,
        )
    return costs


def measure_prefill(kit: Kit, routes: Mapping[str, RouteEntry]) -> dict[str, float]:
    """How long a forward takes under each route, as a multiple of the base's: the best of interleaved rounds.

    Empty where it is not known what the model reads.
    """
    cases: dict[str, RouteEntry] = {BASE: None, **routes}
    with eval_mode(kit.base, kit), torch.no_grad():
        batch, _ = _batch(kit, list(cases.values()))
        if batch is None:
            return {}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        start = time.perf_counter()
        while len(seconds[BASE]) < 1 + ROUNDS or (  # the first warms up
            len(seconds[BASE]) < MOST_ROUNDS and time.perf_counter() - start < len(cases) * SECONDS_PER_CASE
        ):
            for name, route in cases.items():
                kit.use(route)
                seconds[name].append(_seconds(kit, lambda: kit(**batch)))
        kit.use(None)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    return {name: best[name] / best[BASE] for name in routes}


def _training(folders: Sequence[Path | None]) -> TrainingCost:
    if len(folders) > 1:
        return TrainingCost(unknown=f"it is made of {len(folders)} adapters: measure each by itself")
    return read_training_cost(folders[0])


def _batch(kit: Kit, routes: Sequence[RouteEntry]) -> tuple[Any, int]:
    """What is read, and its tokens: a prompt that leaves room to write under every route; else one image."""
    wanted = PROMPT_TOKENS + NEW_TOKENS + 1
    for route in routes:
        with kit.use(route):
            wanted = min(wanted, max_tokens(kit, wanted) or wanted)
    tokens = max(2, wanted - NEW_TOKENS - 1)
    batch = long_batch(kit.base, tokens, None)
    return (dummy_batch(kit.base, 1), 1) if batch is None else (batch, tokens)


def _time(
    cases: Mapping[str, Callable[[], object]], kit: Kit, batch: Mapping[str, Any], tokens: int
) -> dict[str, Times]:
    """Milliseconds per token: the best round of each."""
    best: dict[str, list[float]] = {name: [] for name in cases}
    decoding: dict[str, list[float]] = {name: [] for name in cases}
    decodes = isinstance(kit.base, GenerationMixin) and kit.base.can_generate() and "input_ids" in batch
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    for _ in range(ROUNDS):
        for name, activate in cases.items():
            activate()
            best[name].append(_seconds(kit, lambda: kit(**batch)) * 1e3 / tokens)
            if decodes:
                one, many = (
                    _seconds(
                        kit, partial(kit.generate, **prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                     num_beams=1, pad_token_id=0),
                    )
                    for n in (1, 1 + NEW_TOKENS)
                )  # fmt: skip
                decoding[name].append(max(0.0, many - one) * 1e3 / NEW_TOKENS)
    return {name: (min(best[name]), min(decoding[name]) if decodes else None) for name in cases}


def _seconds(kit: Kit, call: Callable[[], object]) -> float:
    """Of one call, with what it has left to the device."""
    is_cuda = kit.device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(kit.device)
    start = time.perf_counter()
    call()
    if is_cuda:
        torch.cuda.synchronize(kit.device)
    return time.perf_counter() - start
