"""What an adapter costs: values and bytes, by its tensors and by its method's closed form, which must agree.

It knows nothing of models beyond their number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kitout.runtime.adapter import Adapter


@dataclass(frozen=True)
class ParameterCount:
    """What one adapter costs."""

    trainable: int
    """Parameters that require a gradient, heads included."""
    total: int
    """All parameters of the adapter, heads included."""
    heads: int
    """Of those, in replaced modules."""
    percent: float
    """Trainable as a percentage of the base's parameters."""
    bytes: int
    """Of all its tensors, in their dtype."""
    formula: int
    """The method's closed form of its parameters without heads."""

    def __str__(self) -> str:
        return f"{self.trainable:,} trainable ({self.percent:.3f} % of the base), {self.bytes / 2**20:.2f} MiB"


def num_base_parameters(base: nn.Module) -> int:
    """Distinct parameters of the base (tied ones once)."""
    return sum(p.numel() for p in base.parameters())


def count_parameters(adapter: Adapter, base: nn.Module) -> ParameterCount:
    """The adapter's cost. Raises AssertionError if tensors and closed form disagree: that would be a bug of ours."""
    parameters = list(adapter.parameters())
    total = sum(p.numel() for p in parameters)
    heads = sum(p.numel() for p in adapter.heads.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    formula = adapter.method.num_parameters(adapter.sites)
    assert formula == total - heads, f"{adapter.name}: closed form {formula}, tensors {total - heads}"
    size = sum(p.numel() * p.element_size() for p in parameters)
    return ParameterCount(trainable, total, heads, 100.0 * trainable / max(1, num_base_parameters(base)), size, formula)


def count_all_parameters(base: nn.Module, adapters: nn.Module, only_trainable: bool, exclude_embeddings: bool) -> int:
    """Parameters of base and adapters together, as transformers' `num_parameters` counts them."""
    tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    left_out = tables if exclude_embeddings else set()
    parameters = [*base.parameters(), *adapters.parameters()]
    return sum(p.numel() for p in parameters if id(p) not in left_out and (p.requires_grad or not only_trainable))
