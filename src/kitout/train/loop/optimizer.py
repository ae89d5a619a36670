"""AdamW's parameter groups of an adapter, with their learning rates and weight decay; and whether a rate is sane.

A group's rate is the method's default unless the config has one; heads have their own. LoRA+ (Hayou et al. 2024, arXiv
2402.12354) trains a Delta's `loraplus_parameters` at a multiple. Weight decay is kept off parameters of one dimension
(biases, scales, gains) and off prompts and prefixes, known by their ports. It knows no method by name and no loop.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kitout.errors import ConfigError, Errors
from kitout.method import Method, TrainingDefaults

if TYPE_CHECKING:
    from torch import Tensor

    from kitout.runtime.adapter import Adapter

WARN_ABOVE, REFUSE_ABOVE, WARN_BELOW = 10, 300, 1 / 100  # times the method's default rate
NO_DECAY_PORTS = ("tokens", "kv")  # ports whose values are inputs, not maps: pulling them to zero means nothing


def check_learning_rate(method: Method | type[Method], lr: float) -> str | None:
    """A warning if the rate is far from the method's default, or None; ConfigError if training must diverge."""
    name = method.__name__ if isinstance(method, type) else type(method).__name__
    default = _training_defaults(method).lr
    if not 0.0 < lr < math.inf:
        raise ConfigError(f"lr={lr!r} for {name}: write a number above 0; its default is {default:g}")
    times = lr / default
    if _at_least(times, REFUSE_ABOVE):
        raise ConfigError(
            f"lr={lr:g} for {name} is {times:,.0f} times its default of {default:g}, and training would diverge: leave "
            f"lr out, or write lr={default:g} (at most {warn_above(method):g})"
        )
    if _at_least(times, WARN_ABOVE):
        return f"lr={lr:g} is {times:,.0f} times {name}'s default of {default:g}: training may diverge"
    if times <= WARN_BELOW:
        return f"lr={lr:g} is 1/{1 / times:,.0f} of {name}'s default of {default:g}: it may not learn"
    return None


def warn_above(method: Method | type[Method]) -> float:
    """The rate from which on `check_learning_rate` warns."""
    return float(f"{WARN_ABOVE * _training_defaults(method).lr:.6g}")


def refuse_above(method: Method | type[Method]) -> float:
    """The rate from which on `check_learning_rate` refuses."""
    return float(f"{REFUSE_ABOVE * _training_defaults(method).lr:.6g}")


def parameter_groups(
    adapter: Adapter,
    lr: float | None = None,
    *,
    weight_decay: float | None = None,
    head_lr: float | None = None,
    loraplus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW with every parameter of the adapter once; each keeps its full rate as "full".

    None: the method's default. loraplus_ratio: the rate of LoRA+'s parameters (B) over that of the others.
    """
    defaults = adapter.method.training_defaults()
    lr = defaults.lr if lr is None else lr
    weight_decay = defaults.weight_decay if weight_decay is None else weight_decay
    head_lr = defaults.head_lr if head_lr is None else head_lr
    loraplus = {id(value) for value in _loraplus_parameters(adapter)}
    _check_settings(adapter, lr, weight_decay, head_lr, loraplus_ratio, bool(loraplus))
    heads = {id(value) for value in adapter.heads.parameters()}
    has_inputs = any(site.port in NO_DECAY_PORTS for site in adapter.sites)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for value in adapter.parameters():
        in_head = id(value) in heads
        rate = head_lr if in_head else lr * loraplus_ratio if id(value) in loraplus else lr
        decays = value.ndim > 1 and (in_head or not has_inputs)
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(value)
    return [
        {"params": values, "lr": rate, "full": rate, "weight_decay": decay} for (rate, decay), values in groups.items()
    ]


def _loraplus_parameters(adapter: Adapter) -> list[Tensor]:
    deltas = (adapter.delta(site) for site in adapter.sites)
    return [delta.get_parameter(name) for delta in deltas for name in delta.loraplus_parameters]


def _check_settings(
    adapter: Adapter, lr: float, weight_decay: float, head_lr: float, loraplus_ratio: float, has_loraplus: bool
) -> None:
    errors = Errors(ConfigError, f"training {adapter.name!r}")
    for name, value in (("lr", lr), ("head_lr", head_lr), ("loraplus_lr_ratio", loraplus_ratio)):
        if not 0.0 < value < math.inf:
            errors.add(f"{name}={value!r}: write a number above 0")
    if not 0.0 <= weight_decay < math.inf:
        errors.add(f"weight_decay={weight_decay!r}: write 0 or a number above, such as 0.01")
    if loraplus_ratio != 1.0 and not has_loraplus:
        errors.add(
            f"loraplus_lr_ratio={loraplus_ratio:g} is LoRA+'s, of B to A, and {type(adapter.method).__name__} "
            "has neither: leave it out"
        )
    errors.raise_if_any()


def _training_defaults(method: Method | type[Method]) -> TrainingDefaults:
    return method.training if isinstance(method, type) else method.training_defaults()


def _at_least(factor: float, bound: float) -> bool:
    return factor >= bound * (1 - 1e-9)  # 3e-3 / 1e-5 is a hair under 300
