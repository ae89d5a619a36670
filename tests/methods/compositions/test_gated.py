"""Gated by hand: averages over real positions where all see all, a gate per position where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kitout import IA3, BitFit, FullFineTuning, Gated, LoRA, PromptTuning, Stack
from kitout.errors import RouteError
from laws.activate import assert_same, kit_with, loss_of, put_on, run
from zoo import out


@pytest.mark.parametrize(("species", "averages"), [("bert", True), ("llama", False), ("vit", True)])
def test_it_is_its_formula(species: str, averages: bool) -> None:
    kit, batch = kit_with(species, a=LoRA(rank=2, targets="attn.v"), b=BitFit(targets="attn.v"))
    adapter = put_on(kit, Gated(of=("a", "b")), "g")
    site = adapter.sites[0]
    module, delta = kit.base.get_submodule(site.path), adapter.delta(site)
    mask = batch.get("attention_mask")
    if mask is not None:
        batch["attention_mask"] = mask = mask.clone()
        mask[0, 4:] = 0
    seen: dict[str, Tensor] = {}

    def look(_: object, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen.update(x=args[0], y=y)

    values = {}
    for name in (None, "a", "b", "g"):
        handle = module.register_forward_hook(look)
        with kit.use(name):
            run(kit, batch)
        handle.remove()
        values[name] = seen["y"]
    gates = (seen["x"] @ delta.weight.T + delta.bias).sigmoid().detach()
    if averages:
        real = torch.ones(gates.shape[:2]) if mask is None else mask.float()
        gates = ((gates * real[..., None]).sum(1) / real.sum(1)[:, None])[:, None]
    want = values[None] + sum(gates[..., i, None] * (values[n] - values[None]) for i, n in enumerate("ab"))
    assert_same(values["g"], want)


def test_padding_and_other_rows_change_nothing() -> None:
    kit, batch = kit_with("bert", a=LoRA(rank=2), b=IA3(), p=PromptTuning(length=2))
    put_on(kit, Gated(of=("a", "b")), "g")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 4:] = 0
    padded = {**batch, "attention_mask": mask}
    short = {name: value[:1, :4] for name, value in padded.items()}
    for entry in ("g", Stack("p", "g")):
        with kit.use(entry):
            alone = run(kit, short)
            whole = run(kit, padded)
        assert_same(whole[:1], alone)
        with kit.use([entry, "a"]):
            assert_same(run(kit, padded)[:1], whole[:1])
    with kit.use("g"):
        again = out(kit(**padded))
        run(kit, batch)  # another mask, before the backward pass of the first
        loss_of(again).backward()


def test_what_no_gate_can_weigh_is_refused() -> None:
    kit, _ = kit_with("vit", a=LoRA(rank=2), c=FullFineTuning())
    with pytest.raises(RouteError, match="change parameters"):
        kit.add("g", Gated(of=("a", "c")))
