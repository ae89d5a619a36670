"""(c), (d), (e) Many LoRAs on one base: switching, loading, one active and many mixed in a decode-shaped batch.

The model and the adapters (r=8 on q and v, 0.5 MB each) are those on which PEFT was first measured; PEFT runs the same
files beside ours. Decode-shaped: 32 rows of one token, no cache, no gradients.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import Line, interleaved, served
from peft import LoraConfig, get_peft_model
from torch import nn

import kitout
from kitout import Kit, LoRA

ROWS = 32
COUNTS = (1, 8, 32, 64, 256)


def run(rounds: int = 15) -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        kit, loads, switches = fill(Path(folder))
        lines = [_switching(switches), _loading(loads, Path(folder))]
        lines += list(_decoding(kit, rounds))
    return lines


def fill(folder: Path) -> tuple[Kit, dict[int, float], dict[int, float]]:
    """A kit with 256 LoRAs loaded one by one; seconds of a load and of a switch at each of COUNTS."""
    kit = kitout.attach(served())
    kit.add("a0", LoRA(rank=8, targets="attn.q attn.v"), seed=0)
    randomize(kit["a0"])
    kit.save("a0", folder / "a0")
    kit.load(folder / "a0", name="warm")
    kit.remove("warm")
    loads: dict[int, float] = {}
    switches: dict[int, float] = {}
    for n in range(1, max(COUNTS) + 1):
        start = time.perf_counter()
        kit.load(folder / "a0", name=f"a{n}")
        seconds = time.perf_counter() - start
        count = next(c for c in COUNTS if n <= c)
        loads[count] = min(loads.get(count, seconds), seconds)
        if n in COUNTS:
            switches[n] = switch(kit, n)
    for name in kit.names:
        randomize(kit[name])
    return kit, loads, switches


def switch(kit: Kit, n: int) -> float:
    """Best time of one `use` that changes the adapter."""
    best = float("inf")
    for i in range(40):
        name = f"a{1 + i % max(1, n)}" if i % 2 else "a0"
        start = time.perf_counter()
        kit.use(name)
        best = min(best, time.perf_counter() - start) if i > 4 else best
    kit.use(None)
    return best


@torch.no_grad()
def randomize(adapter: nn.Module) -> None:
    for p in adapter.parameters():
        p.normal_(0.0, 0.05)


def _switching(switches: dict[int, float]) -> Line:
    worst = max(switches.values())
    measured = ", ".join(f"{n}: {s * 1e3:.3f}" for n, s in switches.items())
    flat = worst <= 2 * min(switches.values()) + 1e-4
    return Line("use() switch, ms by number of adapters", measured, "< 1 ms, flat", worst < 1e-3 and flat,
                value=worst * 1e3)  # fmt: skip


def _loading(loads: dict[int, float], folder: Path) -> Line:
    measured = ", ".join(f"{n}: {s * 1e3:.1f}" for n, s in loads.items())
    size = (folder / "a0" / "adapter.safetensors").stat().st_size / 2**20
    flat = max(loads.values()) <= 1.5 * min(loads.values()) + 2e-3
    reached = max(loads.values()) <= 0.020 and flat
    label = f"load of one LoRA ({size:.2f} MB), ms by number loaded"
    return Line(label, measured, "<= 20 ms, flat", reached, peer_loads(), value=max(loads.values()) * 1e3)


def peer_loads() -> str:
    """PEFT's load_adapter with as few as 8 and 32 adapters loaded."""
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peer = get_peft_model(served(), config, adapter_name="p0")
    times = []
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder, selected_adapters=["p0"])
        for n in range(1, 33):
            start = time.perf_counter()
            peer.load_adapter(f"{folder}/p0", adapter_name=f"p{n}")
            if n in (8, 32):
                times.append(f"{n}: {(time.perf_counter() - start) * 1e3:.0f}")
    return f"PEFT {', '.join(times)}"


def _decoding(kit: Kit, rounds: int) -> Iterator[Line]:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peer = get_peft_model(served(), config, adapter_name="a0")
    for i in range(1, ROWS):
        peer.add_adapter(f"a{i}", config)
    peer.eval()
    base = served()
    ids = torch.randint(1, 4000, (ROWS, 1), generator=torch.Generator().manual_seed(0))

    def ours(route: object) -> object:
        def call() -> object:
            kit.use(route)
            return kit(input_ids=ids, use_cache=False)

        return call

    def theirs() -> object:
        return peer(input_ids=ids, adapter_names=[f"a{i}" for i in range(ROWS)], use_cache=False)

    cases = {
        "base": lambda: base(input_ids=ids, use_cache=False),
        "one": ours("a1"),
        "8": ours([f"a{i % 8}" for i in range(ROWS)]),
        "32": ours([f"a{i}" for i in range(ROWS)]),
        "peft 32": theirs,
    }
    with torch.no_grad():
        times = interleaved(cases, rounds, warm=2, calls=3)  # type: ignore[arg-type]
    for label, case, to, limit in (
        ("one active LoRA, decode batch, against the base", "one", "base", 1.05),
        ("8 distinct LoRAs, decode batch, against one", "8", "one", 1.30),
        ("32 distinct LoRAs, decode batch, against one", "32", "one", 1.15),
    ):
        yield Line(label, times.ratio_text(case, to), f"<= {limit:.2f} x", times.ratio(case, to) <= limit)
    faster = times.ratio("peft 32", "32")
    detail = f"base {times.best('base') * 1e3:.1f} ms"
    label = "32 distinct LoRAs: PEFT's adapter_names against kitout"
    yield Line(label, f"{faster:.2f} x", ">= 2 x", faster >= 2, detail)
