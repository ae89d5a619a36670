"""What every benchmark shares: interleaved timing, models, and a line of the table.

Cases of one comparison run in turn, round after round, in one process, so that whatever else the machine does falls on
all of them. A result is the ratio of the best rounds, with the median of the round-by-round ratios beside it. Times
are wall times. Nothing here is a test.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()

SMOL = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
    rope_theta=1e5,
)
# The 29.5 M model on which the peers' loading and mixed batches were measured.
SERVED = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    max_position_embeddings=512,
    eos_token_id=None,
    pad_token_id=0,
)


@dataclass
class Line:
    """One row of the table."""

    metric: str
    """What is measured, against what."""
    measured: str
    """The result, in words."""
    target: str
    """The bound it should keep."""
    reached: bool
    """Whether it does."""
    detail: str = ""
    """Seconds, losses, other comparisons."""
    value: float | None = None
    """The figure that its bound is for; None: the first number of `measured`."""
    median: float | None = None
    """The same of the median; None: as `measured` has it, else the figure itself."""


@dataclass
class Times:
    """How long the cases of one comparison took."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds per case, one entry per round."""

    def best(self, case: str) -> float:
        return min(self.rounds[case])

    def ratio(self, case: str, to: str) -> float:
        """Best round over best round: what the code costs when nothing else runs."""
        return self.best(case) / self.best(to)

    def paired(self, case: str, to: str) -> float:
        """Median of the round-by-round ratios."""
        pairs = zip(self.rounds[case], self.rounds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def ratio_text(self, case: str, to: str) -> str:
        return f"{self.ratio(case, to):.3f} x (median of rounds {self.paired(case, to):.3f})"


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: int = 1,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Runs the cases in turn, `rounds` times; each time is that of one call (the mean of `calls`).

    clock: `time.process_time` where calls are so short that whatever else the machine does falls on some of them.
    """
    times = Times({name: [] for name in cases})
    for _ in range(warm):
        for case in cases.values():
            case()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, case in cases.items():
                start = clock()
                for _ in range(calls):
                    case()
                times.rounds[name].append((clock() - start) / calls)
    finally:
        gc.enable()
    return times


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread within. On two, processor time also counts what the second spends waiting for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def smollm2(dtype: torch.dtype, blocks: int = SMOL.num_hidden_layers) -> LlamaForCausalLM:
    """SmolLM2-135M in shape, with random values: speed does not read them. blocks: fewer, with less vocabulary."""
    torch.manual_seed(0)
    config = deepcopy(SMOL)
    config.num_hidden_layers, config.vocab_size = blocks, SMOL.vocab_size * blocks // SMOL.num_hidden_layers
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config).to(dtype)
    return model


def served() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(SERVED).eval()


def product_peak(config: Any, dtype: torch.dtype, rows: int) -> float:
    """Operations a second of plain products of one layer's projections with so many rows, the best of a few rounds."""
    d, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]
    pairs = [(torch.randn(rows, i).to(dtype), torch.randn(o, i).to(dtype)) for i, o in shapes]
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * sum(i * o for i, o in shapes) / best


def share_of_peak(config: Any, tokens_a_second: float, dtype: torch.dtype, rows: int) -> str:
    """The share of the machine's product peak that training reaches, counting 4 operations a weight and token.

    So many are forward and input gradients of the frozen projections; a LoRA step cannot need less for a token it runs.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    peaks = {each: product_peak(config, each, rows) for each in (torch.float32, torch.bfloat16)}
    name = {each: str(each).removeprefix("torch.") for each in peaks}
    figures = ", ".join(f"{name[each]} {peak / 1e9:.0f}" for each, peak in peaks.items())
    share = 4 * weights * tokens_a_second / peaks[dtype]
    return f"{share:.2f} of the {name[dtype]} product peak (GFLOP/s: {figures})"


def machine() -> str:
    """Processor, cores, versions: what a result is worth depends on them."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
