"""Modules that are not just their weight: merged exactly where that can be, refused by name where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BartConfig

import kitout
from kitout import IA3, SSF, FullFineTuning, LoRA
from kitout.errors import NotMergeable
from zoo import EXTRA, out


def scaled_bart() -> nn.Module:
    """A model whose token tables multiply what they look up by sqrt(d)."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        scale_embedding=True,
        max_position_embeddings=16,
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@torch.no_grad()
def perturb(kit: kitout.Kit, name: str) -> None:
    for p in kit[name].parameters():
        p.add_(0.1 * torch.randn_like(p))


def gemma3() -> nn.Module:
    return EXTRA["gemma3"].build()


@pytest.mark.parametrize("build", [scaled_bart, gemma3])
@pytest.mark.parametrize("method", [LoRA(rank=2, targets="embed"), IA3(targets="embed"), SSF(targets="embed")])
def test_a_table_that_scales_merges(build: Callable[[], nn.Module], method: kitout.Method) -> None:
    model = build()
    kit = kitout.attach(model)
    kit.add("e", method, seed=0)
    perturb(kit, "e")
    batch = {"input_ids": torch.arange(3, 9)[None]}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.arange(3, 7)[None]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), kit.use("e"):
        active = out(kit(**batch))
    base = out(kit(**batch))
    kit.merge("e")
    assert not torch.allclose(active, base, atol=1e-3)
    assert torch.allclose(out(kit(**batch)), active, atol=1e-4)
    kit.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_reads_a_table_without_its_scale_is_refused_and_nothing_changes() -> None:
    model = scaled_bart()
    kit = kitout.attach(model)
    kit.add("e", LoRA(rank=2, targets="embed", dora=True), seed=0)
    perturb(kit, "e")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NotMergeable, match="scales by 4"):
        kit.merge("e")
    assert not kit.merged
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_trained_copy_of_it_merges() -> None:
    kit = kitout.attach(scaled_bart())
    kit.add("f", FullFineTuning())
    batch = {"input_ids": torch.arange(3, 9)[None], "decoder_input_ids": torch.arange(3, 7)[None]}
    with torch.no_grad():
        for p in kit["f"].parameters():
            p.add_(0.01 * torch.randn_like(p))
        with kit.use("f"):
            active = out(kit(**batch))
        kit.merge("f")
        assert torch.allclose(out(kit(**batch)), active, atol=1e-5)


class Reflecting(nn.Module):
    """A patch convolution that pads by reflection, before one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q", "k", "v", "o")}) for _ in range(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for layer in self.layers:
            y = nn.functional.scaled_dot_product_attention(layer["q"](x), layer["k"](x), layer["v"](x))
            x = x + layer["o"](y)
        return x


def test_a_convolution_that_pads_by_reflection() -> None:
    kit = kitout.attach(Reflecting(), example_batch={"pixels": torch.randn(2, 3, 6, 6)})
    kit.add("c", LoRA(rank=2, targets="*patch"), seed=0)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for p in kit["c"].parameters():
            p.normal_(0.0, 0.1)
        with kit.use("c"):
            active = kit(x)
        kit.merge("c")
        assert torch.allclose(kit(x), active, atol=1e-5)
