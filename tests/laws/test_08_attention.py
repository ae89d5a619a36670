"""Law 8: eager and sdpa agree on real tokens, for no mask, all ones, left and right padding.

Padding changes nothing on real tokens wherever the base itself does not mind it (`Specimen.left_pads`), and wherever
a method takes positions from the mask: a batch of mixed lengths is its rows one by one. A method that puts something
before the text keeps positions and masks right, or it fails here.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from kitout import Kit
from laws.activate import activated, assert_same, kit_of, pristine, run
from laws.cases import COSTLY, Case, name_of
from zoo import Specimen, padded

LENGTHS = [7, 4, 5]
PADDED = [(*c, "right") for c in COSTLY if c[0].is_text]
PADDED += [(*c, "left") for c in COSTLY if c[0].left_pads or c[1].counts(c[0])]


def has_both(specimen: Specimen) -> bool:
    """transformers has no sdpa for models that cap their attention scores."""
    return getattr(pristine(specimen.name), "_supports_sdpa", True)


def masks(specimen: Specimen) -> dict[str, dict[str, Tensor]]:
    """The same rows without a mask, with a mask of ones, and padded on each side; pictures have only themselves."""
    batch = specimen.batch(len(LENGTHS), 0)
    if not specimen.is_text:
        return {"pictures": batch}
    bare = {k: v for k, v in batch.items() if k != "attention_mask"}
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    return {"no mask": bare, "all ones": batch} | {s: padded(batch, LENGTHS, s, specimen.pad_id) for s in sides}


def real(specimen: Specimen, kit: Kit, batch: dict[str, Tensor]) -> Tensor:
    """The output at real tokens, row after row."""
    value = run(kit, batch)
    mask = batch.get("attention_mask")
    if specimen.kind != "decoder" or mask is None:
        return value.flatten(0, value.ndim - 2)
    return value[mask.bool()]


@pytest.mark.parametrize(("specimen", "case"), [c for c in COSTLY if has_both(c[0]) and c[1].eager(c[0])], ids=name_of)
def test_eager_and_sdpa_agree(specimen: Specimen, case: Case) -> None:
    eager, sdpa = kit_of(specimen, "eager"), kit_of(specimen, "sdpa")
    with activated(eager, case), activated(sdpa, case):
        values = {}
        for what, batch in masks(specimen).items():
            values[what] = real(specimen, sdpa, batch)
            assert_same(values[what], real(specimen, eager, batch), what=what)
        if "no mask" in values:
            assert_same(values["no mask"], values["all ones"], what="a mask of ones against none")


@pytest.mark.parametrize(("specimen", "case", "side"), PADDED, ids=name_of)
def test_padding_changes_nothing_on_real_tokens(specimen: Specimen, case: Case, side: Literal["left", "right"]) -> None:
    kit = kit_of(specimen)
    batch = specimen.batch(len(LENGTHS), 0)
    with activated(kit, case):
        together = real(specimen, kit, padded(batch, LENGTHS, side, specimen.pad_id))
        alone = [
            real(specimen, kit, {k: v[i : i + 1, : n if k != "decoder_input_ids" else None] for k, v in batch.items()})
            for i, n in enumerate(LENGTHS)
        ]
        assert_same(together, torch.cat(alone))
