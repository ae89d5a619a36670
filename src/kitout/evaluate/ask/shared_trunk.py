"""Several adapters over one batch: the blocks below the lowest one that any of them changes run once for all of them.

Only for forwards that keep no keys and values, since the skipped blocks would have to leave theirs. It is tried on a
few tokens first: the logits are those of the whole model, or nothing is shared. It knows kits and token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kitout import fast
from kitout.kit import Kit
from kitout.route import RouteEntry
from kitout.trunk.entry import Layout, TrunkEntry, find_entry

ROWS, TOKENS = 2, 6  # of the batch it is tried on
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the largest logit
HALF_TOLERANCE = 2e-2


class SharedTrunk:
    """What enters the first changed block, by row of the batch that is asked under each route in turn."""

    entry: TrunkEntry
    """Where forwards begin."""

    def __init__(self, entry: TrunkEntry) -> None:
        self.entry = entry
        self._recorded: dict[bytes, Tensor] = {}

    @classmethod
    def find(cls, kit: Kit, routes: Sequence[RouteEntry]) -> SharedTrunk | None:
        """That of these routes; None where one changes the first block, or it does not give their logits."""
        names = [route for route in routes if isinstance(route, str)]
        is_known = all(route is None or isinstance(route, str) for route in routes)
        if len(routes) < 2 or not (fast.enabled() and is_known and names) or kit.merged:
            return None
        if kit.config.is_encoder_decoder or any(site.layer == 0 for name in names for site in kit[name].sites):
            return None
        high = kit.config.get_text_config(decoder=True).vocab_size
        ids = torch.arange(1, ROWS * TOKENS + 1, device=kit.device).view(ROWS, TOKENS) % high
        mask = torch.ones_like(ids)
        entry = find_entry(kit, names, lambda: _run(kit, ids, mask, None), {"input": (ROWS, TOKENS)})
        if isinstance(entry, str):
            return None
        trunk = cls(entry)
        for name in names:
            with kit.use(name), torch.no_grad():
                expected: Tensor = _run(kit, ids, mask, None).logits
                with trunk.within(ids, mask, None):
                    found: Tensor = _run(kit, ids, mask, None).logits
            tolerance = TOLERANCE.get(kit.dtype, HALF_TOLERANCE)
            if not bool((found - expected).abs().max() <= tolerance * expected.abs().max()):
                return None
        trunk.forget()
        return trunk

    def forget(self) -> None:
        """Before another batch."""
        self._recorded = {}

    @contextmanager
    def within(self, ids: Tensor, mask: Tensor, positions: Tensor | None) -> Iterator[None]:
        """Forwards over these rows begin at the entry; a row that was there before is not computed again."""
        keys = [each.numpy().tobytes() for each in torch.stack((ids, mask), 1).cpu()]
        new = [row for key, row in dict(zip(keys, range(len(keys)), strict=True)).items() if key not in self._recorded]
        kit, (_, width) = self.entry.kit, ids.shape
        if new:
            rows = None if positions is None else positions[new]
            with kit.use(None):
                (values,) = self.entry.record(lambda: _run(kit, ids[new], mask[new], rows), [_layout(ids[new])])
            self._recorded |= zip([keys[row] for row in new], values.split(width), strict=True)
        with self.entry.entering([torch.cat([self._recorded[key] for key in keys])], [_layout(ids)]):
            yield


def _run(kit: Kit, ids: Tensor, mask: Tensor, positions: Tensor | None) -> Any:
    options = {} if positions is None else {"position_ids": positions}
    return kit(input_ids=ids, attention_mask=mask, use_cache=False, **options)


def _layout(ids: Tensor) -> Layout:
    """Every column: what is padded is passed on as it is."""
    return Layout((ids.shape[0], ids.shape[1]), torch.arange(ids.numel(), device=ids.device))
