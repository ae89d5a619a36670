"""Law 9: cached generation equals an uncached loop of argmax, and causality holds.

Changing a token never changes the logits before it; left padding changes nothing in what is generated wherever the
base does not mind it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kitout import Kit
from laws.activate import activated, assert_same, kit_of, run
from laws.cases import COSTLY, Case, name_of
from zoo import FIRST_TOKEN, VOCAB, Specimen, padded

NEW = 5
talking = pytest.mark.parametrize(("specimen", "case"), [c for c in COSTLY if c[0].generates], ids=name_of)
causal = pytest.mark.parametrize(
    ("specimen", "case"), [c for c in COSTLY if c[0].kind in ("decoder", "encoder-decoder")], ids=name_of
)


def generate(kit: Kit, batch: dict[str, Tensor], cache: str | None = None) -> Tensor:
    ban = [[i] for i in range(FIRST_TOKEN)]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "disable_compile": True}  # a static cache on a GPU would
    return kit.generate(**batch, **options, do_sample=False, bad_words_ids=ban, cache_implementation=cache)[:, -NEW:]


def loop(specimen: Specimen, kit: Kit, batch: dict[str, Tensor]) -> Tensor:
    """One full forward per token, without any cache."""
    field = "input_ids" if specimen.kind == "decoder" else "decoder_input_ids"
    growing = dict(batch)
    if field not in growing:
        start = kit.config.decoder_start_token_id
        growing[field] = torch.full_like(batch["input_ids"][:, :1], start)
    for _ in range(NEW):
        logits = run(lambda **b: kit(**b, use_cache=False), growing)[:, -1]
        chosen = logits[:, FIRST_TOKEN:].argmax(-1, keepdim=True) + FIRST_TOKEN
        growing[field] = torch.cat((growing[field], chosen), 1)
        if field == "input_ids":
            growing["attention_mask"] = torch.ones_like(growing[field])
    return growing[field][:, -NEW:]


@talking
def test_cached_generation_is_the_uncached_loop(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(3, 0)
    batch.pop("decoder_input_ids", None)
    with activated(kit, case):
        together = generate(kit, batch)
        assert torch.equal(together, loop(specimen, kit, batch))
        assert torch.equal(together, generate(kit, batch, "static"))
        if specimen.kind == "decoder":  # generate derives positions from the mask, so left padding is always harmless
            lengths = [7, 3, 5]
            mixed = generate(kit, padded(batch, lengths, "left", specimen.pad_id))
            for i, n in enumerate(lengths):
                alone = generate(kit, {k: v[i : i + 1, :n] for k, v in batch.items()})
                assert torch.equal(mixed[i : i + 1], alone), f"row {i} of {n} tokens"


@causal
def test_a_token_never_changes_what_comes_before_it(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    field = "input_ids" if specimen.kind == "decoder" else "decoder_input_ids"
    with activated(kit, case):
        before = run(kit, batch)
        for t in range(1, batch[field].shape[1]):
            changed = {k: v.clone() for k, v in batch.items()}
            changed[field][:, t] = (changed[field][:, t] - FIRST_TOKEN + 1) % (VOCAB - FIRST_TOKEN) + FIRST_TOKEN
            after = run(kit, changed)
            assert_same(after[:, :t], before[:, :t], 1e-6, f"logits before token {t}")
            assert not torch.equal(after[:, t:], before[:, t:])
