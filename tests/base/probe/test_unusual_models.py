"""What the probe sees where models batch, lay out or differentiate their values in a way of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import kitout
from kitout import SSF, BitFit, Houlsby
from kitout.base.probe.dummy_batch import num_rows, with_more_rows
from kitout.errors import ConfigError
from zoo import IMAGE, out, randomize_model

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}


@pytest.mark.parametrize("rows", [1, 2])
def test_images_one_after_the_other_come_twice_with_their_rows(rows: int) -> None:
    ids = torch.arange(rows * 6).view(rows, 6)
    batch = {
        "pixel_values": torch.randn(rows * 16, 96),  # patches of all images: more than there are rows
        "input_ids": ids,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "position_ids": ids.expand(3, -1, -1),
    }
    wider, more = with_more_rows(batch)
    assert (num_rows(batch), more) == (rows, 2 * rows)
    shapes = {name: tuple(value.shape) for name, value in wider.items()}
    assert shapes == {
        "pixel_values": (2 * rows * 16, 96),
        "input_ids": (2 * rows, 6),
        "image_grid_thw": (2 * rows, 3),
        "position_ids": (3, 2 * rows, 6),
    }


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (torch.ones(2, 6), "found Tensor"),
        ({"input_ids": None}, "no tensor of rows: it holds input_ids"),
        ({"input_ids": torch.ones(2, 6, dtype=torch.long), "weight": torch.ones(2)}, "not with its rows repeated"),
    ],
)
def test_an_example_batch_that_is_none(batch: object, reason: str) -> None:
    class TwoRows(Speech):
        def forward(self, input_ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
            rows = torch.ones(2, 6) if input_ids is None else input_ids.float()
            return super().forward(rows[..., None].expand(-1, -1, 12) * torch.ones(2, 1, 1))

    with pytest.raises(ConfigError, match=reason):
        kitout.attach(TwoRows(), example_batch=batch)


def test_a_model_of_characters_has_no_vocabulary() -> None:
    config = transformers.CanineConfig(**SMALL, num_hash_buckets=64, local_transformer_stride=8)
    assert kitout.attach(transformers.CanineForSequenceClassification(config).eval()).survey.proven


class ChannelsFirst(nn.LayerNorm):
    """A norm of [B, C, ...] that moves channels itself, under a name that does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsLast(nn.Conv1d):
    """A convolution of [B, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = ChannelsFirst(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Conv1d(d, 2 * d, 1), nn.Conv1d(2 * d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(self.up(x.transpose(1, 2)).relu()).transpose(1, 2)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(12) for _ in range(2))
        self.head = ChannelsLast(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sam() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.SamVisionConfig(
        hidden_size=24, output_channels=10, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE, patch_size=8,
        window_size=2, global_attn_indexes=[1], mlp_dim=32, num_pos_feats=8,
    )  # fmt: skip
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    return transformers.SamVisionModel(config), {"pixel_values": pixels}


def speech() -> tuple[nn.Module, dict[str, Tensor]]:
    return Speech(), {"x": torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
@pytest.mark.parametrize("method", [SSF(), BitFit()], ids=["ssf", "bitfit"])
@pytest.mark.parametrize("build", [sam, speech])
def test_layouts_are_those_that_values_have(build: Callable[[], tuple], method: kitout.Method) -> None:
    model, batch = build()
    kit = kitout.attach(randomize_model(model, 0), example_batch=batch)
    kit.add("x", method, seed=0)
    for p in kit["x"].parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    base = out(kit(**batch))
    with kit.use("x"):
        active = out(kit(**batch))
    assert not torch.allclose(active, base, atol=1e-2)
    sites = [s for s in kit["x"].sites if s.kind in ("norm", "linear")]
    kit.remove("x")
    kit.add("y", type(method)(targets=" ".join(s.path for s in sites)), seed=0)
    for p in kit["y"].parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    with kit.use("y"):
        active = out(kit(**batch))
    kit.merge("y")
    torch.testing.assert_close(out(kit(**batch)), active, rtol=1e-3, atol=1e-4)


class ConvBlock(nn.Module):
    """Every projection is a convolution of [B, C, T]; the stream is [B, T, C]."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Conv1d(d, d, 1) for _ in range(4))
        self.up, self.down = nn.Conv1d(d, 2 * d, 1), nn.Conv1d(2 * d, d, 1)
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (conv(self.first(x).transpose(1, 2)).transpose(1, 2) for conv in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)).transpose(1, 2)
        return x + self.down(self.up(self.second(x).transpose(1, 2)).relu()).transpose(1, 2)


def test_a_sublayer_ends_in_the_layout_of_its_projection() -> None:
    model = Speech()
    model.blocks, model.head = nn.ModuleList(ConvBlock(12) for _ in range(2)), nn.Identity()
    batch = speech()[1]
    kit = kitout.attach(model, example_batch=batch)
    kit.add("x", Houlsby(width=4), seed=0)
    with kit.use("x"):
        kit(**batch).sum().backward()
    sublayers = [s for s in kit["x"].sites if s.role.startswith("sub.")]
    assert len(sublayers) == 4
    assert all(s.channels_first for s in sublayers)
    assert all(p.grad is not None for p in kit["x"].parameters())


class Recurrent(nn.Module):
    """Blocks that run twice, the first time without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for block in self.blocks:
                x = block(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_may_run_without_gradients() -> None:
    _, batch = speech()
    survey = kitout.attach(Recurrent(), example_batch=batch).survey
    assert survey.proven
    assert survey.towers[0].causal is None


class PrefixBlock(Block):
    """The first two tokens see each other, the others what is before them."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask[:2, :2] = True
        return x + self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))


def test_a_text_whose_beginning_sees_itself_is_not_causal() -> None:
    model = nn.Sequential(nn.ModuleList([]), nn.Sequential(*(PrefixBlock(12) for _ in range(2))))
    model.forward = lambda x: model[1](x)
    survey = kitout.attach(model, example_batch={"x": torch.randn(2, 7, 12)}).survey
    assert survey.towers[0].causal is False
