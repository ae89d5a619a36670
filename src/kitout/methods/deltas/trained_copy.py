"""Trained copies of a frozen module's own parameters: what full and partial fine-tuning are made of.

The module itself runs with the copies in place of its parameters, so all its options, layouts and buffers stay its own.
At the port "param" it does so as a whole. Tied parameters have one copy. It knows nothing of how parameters are
selected (`base/find/parameters.py`) or how copies become active (`runtime/modules/`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.weights import FrozenModule, as_matrix, is_transposed
from kitout.delta import Delta


class TiedCopies(nn.Module):
    """The copies that an adapter has so far, by parameter: tied parameters get the same copy. Registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, nn.Parameter] = {}

    def copy(self, key: str, value: Tensor) -> nn.Parameter:
        """The trainable copy for this key, made of the value if there is none yet."""
        return self.copies.setdefault(key, nn.Parameter(value.detach().clone()))


class TrainedCopy(Delta):
    """y' = the module on x with copies of its parameters `site.parameter_names` (named so, dots as slashes)."""

    replaces_module = True
    reads_weight = True

    def __init__(self, site: Site, ties: TiedCopies) -> None:
        super().__init__()
        self.parameter_names = site.parameter_names
        self.is_transposed = is_transposed(site.module)
        for name, key in zip(site.parameter_names, site.tied_keys, strict=True):
            self.register_parameter(name.replace(".", "/"), ties.copy(key, site.module.get_parameter(name)))

    def parameter_values(self) -> dict[str, Tensor]:
        """The copies by the parameter names of the module."""
        return {name: self.get_parameter(name.replace(".", "/")) for name in self.parameter_names}

    def base_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {name.replace(".", "/"): module.get_parameter(name) for name in self.parameter_names}

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """x as the module takes it -> its output in its own layout; y is not read."""
        assert frozen is not None
        output: Tensor = frozen(x, self.parameter_values())
        return output

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """w and b are kept where there is no copy."""
        copies = self.parameter_values()
        if "weight" in copies:
            w = as_matrix(copies["weight"], self.is_transposed).to(w.dtype)
        return w, copies["bias"].to(w.dtype) if "bias" in copies else b


def num_copied_values(sites: Sequence[Site]) -> int:
    """Number of values in these parameters, tied ones once."""
    pairs = (
        (key, s.module.get_parameter(name))
        for s in sites
        for name, key in zip(s.parameter_names, s.tied_keys, strict=True)
    )
    return sum(p.numel() for p in dict(pairs).values())
