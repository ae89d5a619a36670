"""What AdamW is told about an adapter: groups of its parameters with their rates and decay, and whether a rate is sane.

A group's rate is the method's own unless said otherwise, a head's another one; LoRA+ (Hayou et al. 2024, arXiv
2402.12354) trains what a Delta calls `late` at a multiple. Decay is kept off whatever has one dimension (biases,
scales, gains) and off prompts and prefixes, told by where they sit. It knows no method by name and no loop.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kitout.errors import ConfigError, Faults
from kitout.method import Method, Rate
from kitout.runtime.adapter import Adapter

HIGH, REFUSED, LOW = 10, 300, 1 / 100  # times the method's own rate
FREE = ("tokens", "kv")  # ports whose values are inputs, not maps: pulling them to zero means nothing


def check_rate(method: Method | type[Method], lr: float) -> str | None:
    """A warning if the rate is far from the method's own, or None; ConfigError if no training can survive it."""
    name, own = _named(method), _rate(method).lr
    usual = f"the {own:g} that {name} is trained with by default"
    if not 0.0 < lr < math.inf:
        raise ConfigError(f"lr={lr!r} for {name}: write a number above 0; its default is {own:g}")
    times = lr / own
    if _reaches(times, REFUSED):
        raise ConfigError(
            f"lr={lr:g} for {name} is {times:,.0f} times its default of {own:g}, and training would diverge: leave lr "
            f"out, or write lr={own:g} (at most {highest(method):g})"
        )
    if _reaches(times, HIGH):
        return f"lr={lr:g} is {times:,.0f} times {usual}: it may diverge"
    if times <= LOW:
        return f"lr={lr:g} is 1/{1 / times:,.0f} of {usual}: it may not learn"
    return None


def highest(method: Method | type[Method]) -> float:
    """From here on a rate is warned of."""
    return float(f"{HIGH * _rate(method).lr:.6g}")


def refused(method: Method | type[Method]) -> float:
    """From here on a rate is refused."""
    return float(f"{REFUSED * _rate(method).lr:.6g}")


def groups(
    adapter: Adapter,
    lr: float | None = None,
    *,
    decay: float | None = None,
    head_lr: float | None = None,
    ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW that part the adapter's parameters exactly; each keeps its full rate as "full".

    None: the method's own. ratio: LoRA+'s, of the rate of `late` parameters (B) to that of the others.
    """
    own = adapter.method.advised()
    lr, decay = own.lr if lr is None else lr, own.decay if decay is None else decay
    head_lr = own.head if head_lr is None else head_lr
    late = {id(value) for value in _late(adapter)}
    _check(adapter, lr, decay, head_lr, ratio, bool(late))
    heads = {id(value) for value in adapter.heads.parameters()}
    free = any(site.port in FREE for site in adapter.sites)
    found: dict[tuple[float, float], list[Tensor]] = {}
    for value in adapter.parameters():
        head = id(value) in heads
        rate = head_lr if head else lr * ratio if id(value) in late else lr
        decays = value.ndim > 1 and (head or not free)
        found.setdefault((rate, decay if decays else 0.0), []).append(value)
    return [{"params": held, "lr": rate, "full": rate, "weight_decay": pull} for (rate, pull), held in found.items()]


def _late(adapter: Adapter) -> list[Tensor]:
    deltas = (adapter.delta(site) for site in adapter.sites)
    return [delta.get_parameter(name) for delta in deltas for name in delta.late]


def _check(adapter: Adapter, lr: float, decay: float, head_lr: float, ratio: float, late: bool) -> None:
    faults = Faults(ConfigError, f"training {adapter.name!r}")
    for name, value in (("lr", lr), ("head_lr", head_lr), ("ratio", ratio)):
        if not 0.0 < value < math.inf:
            faults.add(f"{name}={value!r}: write a number above 0")
    if not 0.0 <= decay < math.inf:
        faults.add(f"decay={decay!r}: write 0 or a number above, such as 0.01")
    if ratio != 1.0 and not late:
        faults.add(
            f"ratio={ratio:g} is LoRA+'s, of B to A, and {type(adapter.method).__name__} has neither: leave it out"
        )
    faults.raise_if_any()


def _rate(method: Method | type[Method]) -> Rate:
    return method.rate if isinstance(method, type) else method.advised()


def _named(method: Method | type[Method]) -> str:
    return method.__name__ if isinstance(method, type) else type(method).__name__


def _reaches(times: float, bound: float) -> bool:
    return times >= bound * (1 - 1e-9)  # 3e-3 / 1e-5 is a hair under 300
