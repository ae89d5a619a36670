"""Where serial and parallel adapters sit: whole models against blocks written out by hand from the papers' formulas.

One block per way of arranging norms and residuals: post-norm (BERT, BART), pre-norm (ViT, Llama, GPT-2), parallel
residual (NeoX, Falcon), norms on both sides (Gemma 2) and after each sublayer only (OLMo 2), and a mixture of experts.
Attention, feed-forward and norms are the model's own modules; sums and adapters are by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kitout
from kitout import AdaptFormer, Houlsby, Method, ParallelAdapter, Pfeiffer
from kitout.errors import TargetError
from zoo import EXTRA, ZOO, Specimen, out

SPECIES = {**ZOO, **EXTRA}


class Hand:
    """The adapters of one block by hand: each method is one of the places a block may hand a value to."""

    def __init__(self, method: Method, deltas: dict[str, nn.Module]) -> None:
        self.method, self.deltas = method, deltas

    def branch(self, role: str, v: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        d = self.deltas[role]
        return act(v @ d.down.weight.T + d.down.bias) @ d.up.weight.T + d.up.bias

    def sublayer(self, role: str, value: Tensor, stream: Tensor) -> Tensor:
        """What a sublayer adds to the stream. stream: what it added to, before any norm."""
        if role not in self.deltas:
            return value
        if isinstance(self.method, Houlsby):
            return value + self.branch(role, value, F.gelu)
        if isinstance(self.method, ParallelAdapter | AdaptFormer):
            s = self.deltas[role].scale if self.method.scale == "learned" else self.method.scale
            return value + s * self.branch(role, stream, F.relu)
        return value

    def end(self, z: Tensor) -> Tensor:
        """The output of a block whose stream carries the last sum on."""
        if isinstance(self.method, Pfeiffer):
            return z + self.branch("block", z, F.relu)
        return z

    def end_post(self, h: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
        """The output of a block that ends with a norm over feed-forward h and residual x."""
        if isinstance(self.method, Pfeiffer):
            return norm(self.branch("sub.mlp", norm(h + x), F.relu) + h + x)
        return norm(h + x)


def bert(block: Any, hand: Hand, x: Tensor, mask: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
    a = block.attention.output.dense(block.attention.self(x, attention_mask=mask)[0])
    x1 = block.attention.output.LayerNorm(hand.sublayer("sub.attn", a, x) + x)
    h = block.output.dense(F.gelu(block.intermediate.dense(x1)))
    return hand.end_post(hand.sublayer("sub.mlp", h, x1), x1, block.output.LayerNorm)


def bart(block: Any, hand: Hand, x: Tensor, mask: Any = None, encoded: Any = None, encoded_mask: Any = None, **kw: Any):
    a, _ = block.self_attn(hidden_states=x, attention_mask=mask, **{k: v for k, v in kw.items() if k != "use_cache"})
    x = block.self_attn_layer_norm(hand.sublayer("sub.attn", a, x) + x)
    if hasattr(block, "encoder_attn"):
        c, _ = block.encoder_attn(hidden_states=x, key_value_states=encoded, attention_mask=encoded_mask, **kw)
        x = block.encoder_attn_layer_norm(hand.sublayer("sub.cross", c, x) + x)
    h = block.fc2(F.gelu(block.fc1(x)))
    return hand.end_post(hand.sublayer("sub.mlp", h, x), x, block.final_layer_norm)


def vit(block: Any, hand: Hand, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    x1 = x + hand.sublayer("sub.attn", block.attention(block.layernorm_before(x))[0], x)
    return hand.end(x1 + hand.sublayer("sub.mlp", block.mlp(block.layernorm_after(x1)), x1))


def llama(block: Any, hand: Hand, x: Tensor, **kwargs: Any) -> Tensor:
    x1 = x + hand.sublayer("sub.attn", block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)[0], x)
    return hand.end(x1 + hand.sublayer("sub.mlp", block.mlp(block.post_attention_layernorm(x1)), x1))


def gpt2(block: Any, hand: Hand, x: Tensor, past: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
    x1 = x + hand.sublayer("sub.attn", block.attn(block.ln_1(x), past_key_values=past, **kwargs)[0], x)
    return hand.end(x1 + hand.sublayer("sub.mlp", block.mlp(block.ln_2(x1)), x1))


def neox(block: Any, hand: Hand, x: Tensor, **kwargs: Any) -> Tensor:
    a = block.attention(block.input_layernorm(x), **kwargs)[0]
    m = block.mlp(block.post_attention_layernorm(x))
    return hand.end(x + hand.sublayer("sub.attn", a, x) + hand.sublayer("sub.mlp", m, x))


def falcon(block: Any, hand: Hand, x: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
    a, weights = block.self_attention(block.ln_attn(x), **kwargs)
    m = block.mlp(block.ln_mlp(x))
    return hand.end(x + hand.sublayer("sub.attn", a, x) + hand.sublayer("sub.mlp", m, x)), weights


def gemma2(block: Any, hand: Hand, x: Tensor, **kwargs: Any) -> Tensor:
    a = block.post_attention_layernorm(block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)[0])
    x1 = x + hand.sublayer("sub.attn", a, x)
    m = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x1)))
    return hand.end(x1 + hand.sublayer("sub.mlp", m, x1))


def olmo2(block: Any, hand: Hand, x: Tensor, **kwargs: Any) -> Tensor:
    a = block.post_attention_layernorm(block.self_attn(hidden_states=x, **kwargs)[0])
    x1 = x + hand.sublayer("sub.attn", a, x)
    return hand.end(x1 + hand.sublayer("sub.mlp", block.post_feedforward_layernorm(block.mlp(x1)), x1))


BLOCKS: dict[str, Callable[..., Any]] = {
    "bert": bert, "bart": bart, "vit": vit, "llama": llama, "gpt2": gpt2, "gpt-neox": neox, "falcon": falcon,
    "gemma2": gemma2, "olmo2": olmo2, "mixtral": llama,
}  # fmt: skip
POST_NORM = {"bert", "bart"}
METHODS = {
    "houlsby": Houlsby(width=6, norms=False),
    "pfeiffer": Pfeiffer(width=5),
    "parallel": ParallelAdapter(width=7),
    "parallel-everywhere": ParallelAdapter(width=4, scale="learned", targets="sub.*"),
    "adaptformer": AdaptFormer(width=6),
}


def active_kit(specimen: Specimen, method: Method) -> tuple[kitout.Kit, dict[tuple[str, int], dict[str, nn.Module]]]:
    """A kit with the method active and random values, and its deltas by block and role."""
    kit = kitout.attach(specimen.build())
    adapter = kit.add("a", method, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    found: dict[tuple[str, int], dict[str, nn.Module]] = {}
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(torch.randn(value.shape, generator=draw), alpha=0.2)
    for site in adapter.sites:
        found.setdefault((site.tower, site.layer), {})[site.role] = adapter.delta(site)
    kit.use("a")
    return kit, found


def roles_of(specimen: Specimen, method: Method, tower: str) -> set[str]:
    """Where the papers put this method in a block of this tower."""
    if isinstance(method, Pfeiffer):
        return {"sub.mlp"} if specimen.name in POST_NORM else {"block"}
    if method.targets is None and not isinstance(method, Houlsby):
        return {"sub.mlp"}
    return {"sub.attn", "sub.mlp"} | ({"sub.cross"} if "decoder" in tower and specimen.kind != "decoder" else set())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_model_equals_its_blocks_written_by_hand(name: str, method: Method) -> None:
    specimen = SPECIES[name]
    kit, deltas = active_kit(specimen, method)
    bare = specimen.build()
    for tower in {t for t, _ in deltas}:
        blocks = bare.get_submodule(tower)
        for layer, block in enumerate(blocks):
            assert deltas[tower, layer].keys() == roles_of(specimen, method, tower)
            block.forward = partial(BLOCKS[name], block, Hand(method, deltas[tower, layer]))
    batch = specimen.batch(3, 5)
    expected, got = out(bare(**batch)), out(kit(**batch))
    with kit.use(None):
        base = out(kit(**batch))
    assert (expected - base).abs().max() > 1e-2, "the adapter by hand does nothing: this compares nothing"
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@torch.no_grad()
def test_by_hand_without_adapters_is_the_model_itself() -> None:
    """The blocks above are the models' own: a mistake in them would hide one in the library."""
    for name, block_by_hand in BLOCKS.items():
        specimen = SPECIES[name]
        model, bare = specimen.build(), specimen.build()
        kit = kitout.attach(specimen.build())
        for block in kit.survey.blocks:
            own = bare.get_submodule(block.path)
            own.forward = partial(block_by_hand, own, Hand(ParallelAdapter(), {}))
        batch = specimen.batch(2, 1)
        assert (out(bare(**batch)) - out(model(**batch))).abs().max() <= 2e-5, name


@pytest.mark.parametrize("name", ["vit", "timm-vit", "dinov2", "llama", "gpt-neox"])
@torch.no_grad()
def test_adaptformer_reads_the_stream_before_the_norm(name: str) -> None:
    """Seen from outside: the branch's input is the tensor that the feed-forward's norm is given."""
    specimen = SPECIES[name]
    kit, deltas = active_kit(specimen, AdaptFormer(width=4))
    read: list[Tensor] = []
    given: list[Tensor] = []
    ((tower, layer), delta) = next(iter(deltas.items()))
    delta["sub.mlp"].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    source = next(s for s in kit["a"].sites if (s.tower, s.layer) == (tower, layer)).input_from
    norm = kit.base.get_submodule(source)
    assert "norm" in type(norm).__name__.lower()
    norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    kit(**specimen.batch(2, 0))
    assert len(read) == len(given) == 1
    assert torch.equal(read[0], given[0])


class Block(nn.Module):
    """A block whose norms are called anything at all. form: of its norms and sums."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.widen, self.narrow = nn.Linear(16, 40), nn.Linear(40, 16)
        self.alpha, self.beta, self.form = nn.LayerNorm(16), nn.LayerNorm(16), form

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "post":
            x = self.alpha(x + self.attend(x))
            x += self.narrow(F.relu(self.widen(x)))  # in place, and handed on as a view
            return self.beta(x.view(-1, 16)).view(x.shape)
        if self.form == "windows":  # the attention reads a copy of the stream
            x = x + self.attend(self.alpha(x.flip(1).flip(1)))
            return x + self.narrow(F.relu(self.widen(self.beta(x))))
        if self.form == "stacked":  # a sum that is no addition
            x = torch.stack((x, self.attend(self.alpha(x)))).sum(0)
            return x + self.narrow(F.relu(self.widen(self.beta(x))))
        x = x + self.attend(self.alpha(x))
        if self.form == "pre":
            return x + self.narrow(F.relu(self.widen(self.beta(x))))
        x = x + self.narrow(F.relu(self.widen(x)))
        return x + self.beta(x)  # a norm takes the sum, and yet the sum itself goes on


class Model(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(form), Block(form)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("form", ["post", "pre", "beside"])
def test_post_norm_is_seen_and_not_read_off_a_name(form: str) -> None:
    model = Model(form)
    kit = kitout.attach(model, example_batch={"x": torch.randn(2, 5, 16)})
    subs = {s.role: s for s in kit.survey.sites if s.role.startswith("sub.") and s.layer == 0}
    assert subs["sub.mlp"].post_norm is (model.blocks[0].beta if form == "post" else None)
    assert subs["sub.attn"].post_norm is (model.blocks[0].alpha if form == "post" else None)
    assert {s.role for s in Pfeiffer().sites(kit.survey)} == ({"sub.mlp"} if form == "post" else {"block"})


@torch.no_grad()
def test_the_stream_is_read_from_the_block_where_nothing_else_reads_it() -> None:
    model = Model("windows")
    batch = {"x": torch.randn(2, 5, 16)}
    kit = kitout.attach(model, example_batch=batch)
    adapter = kit.add("a", ParallelAdapter(width=3, scale=2.0, targets="sub.attn"), seed=0)
    assert [s.input_from for s in adapter.sites] == ["blocks.0", "blocks.1"]
    expected = batch["x"]
    for block, site in zip(model.blocks, adapter.sites, strict=True):
        delta = adapter.delta(site)
        delta.up.weight.normal_()
        hand = Hand(adapter.method, {"sub.attn": delta})
        x1 = expected + hand.sublayer("sub.attn", block.attend(block.alpha(expected)), expected)
        expected = x1 + block.narrow(F.relu(block.widen(block.beta(x1))))
    with kit.use("a"):
        torch.testing.assert_close(kit(**batch), expected)
    other = {"x": torch.randn(2, 5, 16)}
    with kit.use([None, "a"]):
        mixed = kit(**other)
    with kit.use("a"):
        torch.testing.assert_close(mixed[1], kit(**other)[1])


def test_a_sublayer_that_was_not_seen_is_missed() -> None:
    kit = kitout.attach(Model("stacked"), example_batch={"x": torch.randn(2, 5, 16)})
    with pytest.raises(TargetError, match=r"sub\.attn.*blocks\.0, blocks\.1.*targets='sub\.\*'"):
        kit.add("a", Houlsby())
    assert [s.path for s in Houlsby(targets="sub.*", norms=False).sites(kit.survey)] == [
        "blocks.0.narrow",
        "blocks.1.narrow",
    ]
    kit.add("b", AdaptFormer())
