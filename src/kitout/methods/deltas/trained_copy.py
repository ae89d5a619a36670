"""Trained copies of a frozen module's own parameters: what full and partial fine-tuning are made of.

The module itself runs with the copies in the place of its parameters, so every option, layout and buffer stays its own.
At the port "param" it does so as a whole. Tied parameters are one copy. It knows nothing of how places are chosen
(`Survey.parameters`) or how copies are worn.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.weights import FrozenModule, as_matrix, is_transposed
from kitout.delta import Delta


class TiedCopies(nn.Module):
    """The copies an adapter has so far: a second use of one parameter takes the same copy. Registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, nn.Parameter] = {}

    def copy(self, key: str, value: Tensor) -> nn.Parameter:
        """A trainable copy of the value, the one there is already for this key."""
        return self.copies.setdefault(key, nn.Parameter(value.detach().clone()))


class TrainedCopy(Delta):
    """y' = the module on x with these copies for its parameters `site.names`, named as there (dots as slashes)."""

    replaces_module = True
    reads_weight = True

    def __init__(self, site: Site, ties: TiedCopies) -> None:
        super().__init__()
        self.parameter_names = site.parameter_names
        self.is_transposed = is_transposed(site.module)
        for name, key in zip(site.parameter_names, site.tied_keys, strict=True):
            self.register_parameter(name.replace(".", "/"), ties.copy(key, site.module.get_parameter(name)))

    def parameter_values(self) -> dict[str, Tensor]:
        """The copies by the names their module has for them."""
        return {name: self.get_parameter(name.replace(".", "/")) for name in self.parameter_names}

    def base_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {name.replace(".", "/"): module.get_parameter(name) for name in self.parameter_names}

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """x as the module takes it -> what it gives, in its own layout; y is not read."""
        assert frozen is not None
        new: Tensor = frozen(x, self.parameter_values())
        return new

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """w, b: the frozen ones, kept where there is no copy."""
        own = self.parameter_values()
        if "weight" in own:
            w = as_matrix(own["weight"], self.is_transposed).to(w.dtype)
        return w, own["bias"].to(w.dtype) if "bias" in own else b


def num_copied_values(sites: Sequence[Site]) -> int:
    """Values in these parameters, tied ones once."""
    pairs = (
        (key, s.module.get_parameter(name))
        for s in sites
        for name, key in zip(s.parameter_names, s.tied_keys, strict=True)
    )
    return sum(p.numel() for p in dict(pairs).values())
