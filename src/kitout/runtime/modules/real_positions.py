"""Which positions of a row are real, for what averages over them: the mask that a stack of blocks is called with.

Averages are for stacks where every position sees all others. The mask is kept with the state of the forward, so that a
recomputation has that of its own forward. It knows stacks and masks, and nothing of what is averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.survey import Survey, Tower
from kitout.delta import Delta
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState


def averaging_tower(survey: Survey, site: Site, delta: Delta) -> Tower | None:
    """The stack over whose positions a Delta averages at a site; None where each position is for itself.

    Every position of the stack sees all others (encoders of text, stacks of images), and the value keeps those of a row
    together: not experts, which are given tokens of any row. Windows of an image do, each for itself; a text has a mask
    of its rows and none of its windows.
    """
    if not delta.averages_positions or site.layer is None or site.batch_relation in ("one", "none"):
        return None
    for tower in survey.towers:
        if tower.path == site.tower and (tower.embedder is None or tower.causal is False):
            return None if tower.embedder is not None and site.batch_relation == "multiple" else tower
    return None


def averaging_towers(survey: Survey, deltas: Iterable[tuple[Site, Delta]]) -> list[Tower]:
    """The stacks where one of these Deltas averages over positions."""
    found = [averaging_tower(survey, site, delta) for site, delta in deltas]
    return list({tower.path: tower for tower in found if tower is not None}.values())


class RealPositions:
    """The real positions of one stack in the forward in progress; `value` is that of some rows while those run."""

    def __init__(self, slot: ForwardSlot, tower: str) -> None:
        self.slot, self.tower = slot, tower
        self._of_rows: tuple[ForwardState, Tensor] | None = None

    @property
    def value(self) -> Tensor | None:
        if self._of_rows is not None and self._of_rows[0] is self.slot.state:
            return self._of_rows[1]
        return self.slot.state.real_positions.get(self.tower)

    @value.setter
    def value(self, mask: Tensor | None) -> None:
        self._of_rows = None if mask is None else (self.slot.state, mask)

    def of(self, y: Tensor, path: str) -> Tensor | None:
        """[rows, tokens], 1 or 0, for a value [rows, ..., tokens, d]; None for [positions, d], each for itself."""
        mask = self.value
        if y.ndim < 3:
            return None
        if mask is None:
            return y.new_ones(y.shape[:-1])
        if mask.shape != y.shape[:-1]:
            raise RouteError(
                f"{path} gives values {list(y.shape)}, and the mask of its stack is {list(mask.shape)}: which of them "
                "are real is not known"
            )
        return mask.to(y.dtype)


class RecordRealPositions:
    """The program of a module that owns a stack: keeps the mask it is called with. inner: its own program."""

    def __init__(self, tower: str, slot: ForwardSlot, argument: int | None, inner: Any = None) -> None:
        self.tower, self.slot, self.argument, self.inner = tower, slot, argument, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None and self.argument is not None and self.argument < len(args):
            mask = args[self.argument]
        masks = self.slot.state.real_positions
        masks.pop(self.tower, None)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            masks[self.tower] = mask.bool() if not mask.is_floating_point() else mask > 0
        elif mask is not None:
            raise RouteError(
                "an average over real positions needs an attention_mask [rows, tokens], with 1 where a position is "
                f"real, found {list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        return forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)
