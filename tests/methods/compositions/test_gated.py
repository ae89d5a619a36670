"""Gated by hand: averages over real positions where all see all, a gate per position where they do not."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

import kitout
from kitout import IA3, VPT, BitFit, FullFineTuning, Gated, LoRA, PromptTuning, Stack
from kitout.errors import RouteError
from laws.activate import assert_same, kit_with, loss_of, put_on, run
from zoo import out, randomize_model


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


@pytest.mark.parametrize("species", ["swin", "switch"])
def test_windows_average_for_themselves_and_experts_not_at_all(species: str) -> None:
    """A window is all that its module sees of a row; an expert's tokens are of any row."""
    kit, batch = kit_with(species, a=LoRA(rank=2, targets="attn.v mlp.up"), b=IA3())
    adapter = put_on(kit, Gated(of=("a", "b")), "g")
    seen: dict[str, Tensor] = {}
    for site in adapter.sites:
        combine = adapter.delta(site).combine
        adapter.delta(site).combine = lambda x, y, values, real=None, key=site.key, combine=combine: (
            seen.update({key: real}),
            combine(x, y, values, real),
        )[1]
    kit.use("g")
    value = run(kit, batch)
    unlike = {"none": False, "multiple": True}
    found = {
        s.batch_relation: seen[s.key] is not None for s in adapter.sites if s.key in seen and s.batch_relation in unlike
    }
    assert found
    assert found.items() <= unlike.items()
    assert_same(run(kit, {name: rows[1:] for name, rows in batch.items()}), value[1:])


def test_a_convolution_within_a_block_has_its_average() -> None:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 2], sr_ratios=[2, 1],
        strides=[4, 2], patch_sizes=[7, 3], mlp_ratios=[2, 2], decoder_hidden_size=8,
    )  # fmt: skip
    kit = kitout.attach(randomize_model(transformers.SegformerForImageClassification(config), 0))
    for seed, name in enumerate("ab"):
        put_on(kit, BitFit(everywhere=True), name, seed=seed)
    adapter = put_on(kit, Gated(of=("a", "b")), "g")
    assert any(site.channels_first and site.layer is not None for site in adapter.sites)
    kit.use("g")
    pixels = torch.randn(2, 3, 32, 32)
    assert_same(run(kit, {"pixel_values": pixels[1:]}), run(kit, {"pixel_values": pixels})[1:])


@pytest.mark.parametrize("deep", [VPT(length=3), VPT(length=2, deep=True, layers="last:1")], ids=["first", "last"])
def test_visual_prompts_of_other_rows_are_not_averaged(deep: VPT) -> None:
    kit, batch = kit_with("vit", a=LoRA(rank=2), b=IA3(), v=deep)
    put_on(kit, Gated(of=("a", "b")), "g")
    rows = ["v", "g", None, Stack("v", "g")]
    batch = {name: value.repeat(2, 1, 1, 1) for name, value in batch.items()}
    with kit.use(rows):
        together = run(kit, batch)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            assert_same(run(kit, {name: value[i : i + 1] for name, value in batch.items()}), together[i : i + 1])


def test_what_no_gate_can_weigh_is_refused() -> None:
    kit, _ = kit_with("vit", a=LoRA(rank=2), c=FullFineTuning())
    with pytest.raises(RouteError, match="change parameters"):
        kit.add("g", Gated(of=("a", "c")))
