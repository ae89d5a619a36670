"""Prompts and prefixes outputs of real tokens, against the base model on the whole text.

Each row of a batch is run alone, unpadded, with the virtual tokens written out in its text: by the base model, which
knows nothing of kitout. Generation is compared with the base model's own on the whole texts, padded at the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laws.activate import assert_same
from zoo import FIRST_TOKEN, Specimen, out, padded

FRONT = (11, 29, 13, 47, 15)
LENGTHS = [7, 4, 6]
PADDINGS = ("none", "ones", "left", "right")
NEW = 6
HOW = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "bad_words_ids": [[i] for i in range(FIRST_TOKEN)],
}
BOTH = {"return_dict_in_generate": True, "output_logits": True}


def text(specimen: Specimen, padding: str) -> dict[str, Tensor]:
    """Three rows of a text model's input: without a mask, with one of ones, or of different lengths."""
    batch = specimen.batch(3, 0)
    if padding == "none":
        del batch["attention_mask"]
    elif padding in ("left", "right"):
        batch = padded(batch, LENGTHS, padding, specimen.pad_id)  # type: ignore[arg-type]
    return batch


def real(batch: Mapping[str, Tensor]) -> Tensor:
    """Which columns are tokens, and not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def whole(row: Tensor, front: Sequence[int], after: bool = False) -> Tensor:
    """One row's text [T] with the virtual tokens before it, or after its first token."""
    return torch.cat((row[:after], torch.tensor(front, dtype=torch.long), row[after:]))


@torch.no_grad()
def alone(model: nn.Module, row: Tensor, front: Sequence[int], after: bool = False) -> Tensor:
    """The model's outputs for one row's own tokens [T, ...] when it reads the virtual tokens' text as well."""
    outputs = out(model(input_ids=whole(row, front, after)[None]))[0]
    return torch.cat((outputs[:after], outputs[len(front) + after :]))


@torch.no_grad()
def assert_whole(
    kit: nn.Module, base: nn.Module, batch: Mapping[str, Tensor], front: Sequence[int] = FRONT, after: bool = False
) -> None:
    """Every real token of every row gets what the base model gives it on the whole text."""
    outputs = out(kit(**batch))
    assert outputs.shape[:2] == batch["input_ids"].shape
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], real(batch), strict=True)):
        assert_same(outputs[row, mask], alone(base, ids[mask], front, after), what=f"row {row}")


@torch.no_grad()
def assert_generates(
    kit: Any, base: Any, batch: Mapping[str, Tensor], front: Sequence[int] = FRONT, after: bool = False, **how: Any
) -> None:
    """`generate` on the batch gives the tokens and logits that the base model gives on the whole texts."""
    ids, mask = batch["input_ids"], real(batch)
    long = torch.zeros(len(ids), ids.shape[1] + len(front), dtype=torch.long)
    for row, r in enumerate(ids):
        text = whole(r[mask[row]], front, after)
        long[row, -len(text) :] = text
    there = base.generate(input_ids=long, attention_mask=(long > 0).long(), **HOW, **BOTH, **how)
    here = kit.generate(**batch, **HOW, **BOTH, **how)
    assert here.sequences.shape == (len(there.sequences), ids.shape[1] + NEW)
    assert torch.equal(here.sequences[:, -NEW:], there.sequences[:, -NEW:])
    assert_same(torch.stack(here.logits), torch.stack(there.logits), what="generated logits")


@torch.no_grad()
def assert_decodes(
    kit: Any, base: Any, batch: Mapping[str, Tensor], front: Sequence[int] = FRONT, after: bool = False, first: int = 3
) -> None:
    """A caller's own loop: the first columns at once, two more, then one at a time, into the cache that came back."""
    ids, mask = batch["input_ids"], real(batch)
    assert mask[:, 0].all() or first >= 3
    steps = [slice(0, first), slice(first, first + 2), *(slice(i, i + 1) for i in range(first + 2, ids.shape[1]))]
    cache, outputs = None, []
    for step in steps:
        more = {"attention_mask": batch["attention_mask"][:, : step.stop]} if "attention_mask" in batch else {}
        output = kit(input_ids=ids[:, step], past_key_values=cache, use_cache=True, **more)
        cache = output.past_key_values
        outputs.append(out(output))
    joined = torch.cat(outputs, 1)
    for row in range(len(ids)):
        assert_same(joined[row, mask[row]], alone(base, ids[row][mask[row]], front, after), what=f"row {row}")
