"""Prefix tuning: what it computes, against the bare model on the whole text or over a cache that was filled by hand.

A prefix that holds the keys and values of real tokens is those tokens, under every mask, kernel and cache; how it
weighs, mixes, is saved and is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import kitout
from full_text import FRONT, PADDINGS, assert_decodes, assert_generates, assert_whole, real, text
from kitout import Mix, PrefixTuning
from kitout.errors import NotMergeable, RouteError, TargetError
from laws.activate import assert_same, fresh_kit, pristine, put_on, run, set_attention
from zoo import EXTRA, ZOO, out

TOKENS = PrefixTuning(length=len(FRONT), init=FRONT)
DECODERS = ("gpt2", "llama", "qwen3")  # learned positions; groups of queries; heads of another width than d / H


def active_kit(name: str, method: PrefixTuning = TOKENS, attention: str = "") -> kitout.Kit:
    kit = fresh_kit(ZOO[name])
    if attention:
        set_attention(kit.base, attention)
    kit.add("p", method, seed=0)
    kit.use("p")
    return kit


def flat(kit: kitout.Kit, name: str = "p") -> dict[str, Tensor]:
    """The prefix [m, 2, H_kv, d_h] of each attention."""
    return {s.path: kit[name].delta(s).prefix for s in kit[name].sites}


# --- real tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_of_real_tokens_is_the_whole_text(name: str, padding: str, attention: str) -> None:
    kit = active_kit(name, attention=attention)
    assert_whole(kit, pristine(name), text(ZOO[name], padding))


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_of_real_tokens_generates_the_whole_text(name: str) -> None:
    kit, bare = active_kit(name), pristine(name)
    for padding in ("none", "ones", "left"):
        batch = text(ZOO[name], padding)
        for how in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}):
            assert_generates(kit, bare, batch, **how)
    set_attention(kit.base, "eager")
    assert_generates(kit, bare, text(ZOO[name], "left"))


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_of_real_tokens_in_a_loop_of_ones_own(name: str) -> None:
    for padding in PADDINGS:
        if padding != "right":
            assert_decodes(active_kit(name), pristine(name), text(ZOO[name], padding))


@pytest.mark.parametrize("name", DECODERS)
def test_assisted_generation_is_greedy(name: str) -> None:
    kit, batch = active_kit(name), text(ZOO[name], "ones")
    one = {k: v[:1].repeat(1, 3) for k, v in batch.items()}  # repeats itself, so that there is something to look up
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(kit.generate(**one, **how, prompt_lookup_num_tokens=3), kit.generate(**one, **how))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_without_head_takes_one_too(name: str) -> None:
    """Its stack belongs to the model itself."""
    bare = pristine(name).base_model
    kit = kitout.attach(ZOO[name].build().base_model)
    kit.add("p", TOKENS)
    kit.use("p")
    for padding in PADDINGS:
        assert_whole(kit, bare, text(ZOO[name], padding))
    assert_decodes(kit, bare, text(ZOO[name], "left"))


def bert_by_hand(model: nn.Module, ids: Tensor, prefix: list[Tensor]) -> Tensor:
    """BertModel's last hidden state for one row [1, T], text at the positions after the prefix."""
    emb, m = model.embeddings, len(prefix[0])
    x = emb.word_embeddings(ids) + emb.token_type_embeddings.weight[0]
    x = emb.LayerNorm(x + emb.position_embeddings.weight[m : m + ids.shape[1]])
    for layer, p in zip(model.encoder.layer, prefix, strict=True):
        own = layer.attention.self
        q, k, v = (f(x).unflatten(-1, (4, 12)).transpose(1, 2) for f in (own.query, own.key, own.value))
        k, v = (torch.cat((new.transpose(0, 1)[None], t), 2) for new, t in ((p[:, 0], k), (p[:, 1], v)))
        h = (torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1) @ v).transpose(1, 2).flatten(2)
        x = layer.attention.output(h, x)
        x = layer.output(layer.intermediate(x), x)
    return x


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
def test_an_encoder_sees_the_prefix_from_every_token(padding: str) -> None:
    bare, batch = pristine("bert").bert, text(ZOO["bert"], padding)
    kit = kitout.attach(ZOO["bert"].build().bert)
    put_on(kit, PrefixTuning(length=4), "p")
    kit.use("p")
    made = kit(**batch).last_hidden_state
    prefix = list(flat(kit).values())
    for row, mask in enumerate(real(batch)):
        expected = bert_by_hand(bare, batch["input_ids"][row][mask][None], prefix)[0]
        assert_same(made[row, mask], expected, what=f"row {row}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt-neox", "opt", "falcon", "bert", "t5", "bart"])
def test_padding_under_sdpa_never_hides_a_prefix(name: str) -> None:
    specimen = {**ZOO, **EXTRA}[name]
    for side in ("left", "right"):
        kit, batch = fresh_kit(specimen), text(specimen, side)
        set_attention(kit.base, "sdpa")
        base = run(kit, batch)
        kit.add("p", PrefixTuning(length=5), seed=0)
        kit.use("p")
        moved = (run(kit, batch) - base).abs().flatten(2).amax(-1) if base.ndim > 2 else (run(kit, batch) - base).abs()
        mask = real(batch) if specimen.kind == "decoder" else torch.ones_like(moved, dtype=torch.bool)
        for row in range(3):
            assert moved[row, mask[row]].max() > 1e-3, f"row {row}, padded at the {side}"


# --- what it holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads", "width"), [("gpt2", 4, 12), ("llama", 2, 12), ("qwen3", 2, 16), ("vit", 4, 12)]
)
def test_a_flat_prefix_is_keys_and_values_by_head(name: str, heads: int, width: int) -> None:
    kit = active_kit(name, PrefixTuning(length=7))
    assert [tuple(p.shape) for p in flat(kit).values()] == [(7, 2, heads, width)] * ZOO[name].layers
    assert {id(p) for p in kit.parameters()} == {id(p) for p in flat(kit).values()}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "vit", "bart"])
def test_the_encoder_is_saved_only_to_resume_training(name: str, shared: bool, tmp_path: Path) -> None:
    specimen, m = ZOO[name], 5
    kit, batch = fresh_kit(specimen), specimen.batch(2, 0)
    put_on(kit, PrefixTuning(length=m, encoder=6, shared=shared), "p")
    with kit.use("p"):
        before = run(kit, batch)
    kit.save("p", tmp_path / "folded")
    kit.save("p", tmp_path / "whole", keep_encoder=True)
    held = load_file(next((tmp_path / "folded").glob("*.safetensors")))
    assert sum(t.numel() for t in held.values()) == sum(2 * m * s.d_out for s in kit["p"].sites)
    for folder, encoder in (("folded", None), ("whole", 6)):
        back = fresh_kit(specimen)
        adapter = back.load(tmp_path / folder)
        assert adapter.method.encoder == encoder
        back.use("p")
        assert torch.equal(run(back, batch), before)
        back.train()
        assert all(p.requires_grad for p in adapter.parameters())
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            out(back(**batch)).square().mean().backward()
            optimizer.step()
        back.eval()
        assert (run(back, batch) - before).abs().max() > 1e-4


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
def test_strength_zero_is_the_base_bit_for_bit(name: str) -> None:
    kit, batch = fresh_kit(ZOO[name]), ZOO[name].batch(2, 0)
    base = run(kit, batch)
    kit.add("p", PrefixTuning(length=4), seed=0)
    kit.strength("p", 0.0)
    with kit.use("p"):
        assert torch.equal(run(kit, batch), base)
    with kit.use([None, "p"]):
        assert torch.equal(run(kit, batch), base)


def held_twice(kit: kitout.Kit, times: dict[str, int]) -> None:
    """Adds "q", the prefixes of these adapters one after the other, each several times."""
    kit.add("q", PrefixTuning(length=sum(len(next(iter(flat(kit, n).values()))) * t for n, t in times.items())))
    for path, value in flat(kit, "q").items():
        value.data.copy_(torch.cat([flat(kit, n)[path] for n, t in times.items() for _ in range(t)]))


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_strength_two_is_every_key_twice(name: str) -> None:
    kit, batch = active_kit(name, PrefixTuning(length=3)), ZOO[name].batch(2, 0)
    held_twice(kit, {"p": 2})
    kit.strength("p", 2.0)
    two = run(kit, batch)
    with kit.use("q"):
        assert_same(two, run(kit, batch))
    kit.strength("p", 1.0)
    assert (run(kit, batch) - two).abs().max() > 1e-3


def test_a_mix_of_prefixes_is_their_keys_by_weight() -> None:
    kit, batch = active_kit("vit", PrefixTuning(length=3)), ZOO["vit"].batch(2, 0)
    kit.add("r", PrefixTuning(length=5), seed=1)
    held_twice(kit, {"p": 2, "r": 3})
    alone = run(kit, batch)
    with kit.use(Mix({"p": 1.0})):
        assert_same(run(kit, batch), alone)
    with kit.use("q"):
        expected = run(kit, batch)
    for route in (Mix({"p": 2.0, "r": 3.0}), [Mix({"p": 2.0, "r": 3.0}), "q"]):
        with kit.use(route):
            assert_same(run(kit, batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_a_mix_over_text_ends_where_the_text_begins(name: str) -> None:
    """The bare model over a cache that holds p's keys twice and r's once, its text at the longer one's positions."""
    kit, bare, batch = active_kit(name, PrefixTuning(length=3)), pristine(name), text(ZOO[name], "none")
    kit.add("r", PrefixTuning(length=5), seed=1)
    both = {p: torch.cat((flat(kit)[p],) * 2 + (flat(kit, "r")[p],)) for p in flat(kit)}
    cache = tf.DynamicCache()
    for layer, value in enumerate(both.values()):
        k, v = (value[:, i].transpose(0, 1)[None].expand(3, -1, -1, -1) for i in (0, 1))
        cache.update(k, v, layer)
    length = batch["input_ids"].shape[1]
    expected = bare(**batch, past_key_values=cache, position_ids=torch.arange(5, 5 + length)[None]).logits
    with kit.use(Mix({"p": 2.0, "r": 1.0})):
        assert_same(run(kit, batch), expected)


def test_negative_weights_are_refused() -> None:
    kit = active_kit("llama", PrefixTuning(length=3))
    with pytest.raises(RouteError, match=r"'p' has a prefix.*-1"):
        kit.strength("p", -1.0)
    with pytest.raises(RouteError, match=r"Mix weight of -0\.5 on a prefix"):
        kit.use(Mix({"p": -0.5}))
    assert kit.active == "p"


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_a_prefix_is_no_weight(name: str) -> None:
    kit = active_kit(name, PrefixTuning(length=3))
    for fold in (kit.merge, kit.merged_copy):
        with pytest.raises(NotMergeable) as error:
            fold("p")
        assert kit["p"].sites[0].path in str(error.value)
    assert not kit.merged


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin", "windows"),
        ("modernbert", "window"),
        ("mpt", "writes its attention out"),
        ("gptj", "writes its attention out"),
    ],
)
def test_attention_that_takes_no_keys_is_named(name: str, reason: str) -> None:
    kit = fresh_kit({**ZOO, **EXTRA}[name])
    with pytest.raises(TargetError, match=reason) as error:
        kit.add("p", PrefixTuning(length=8))
    assert any(f"{b.path}." in f"{error.value}" for b in kit.survey.blocks), error.value
    assert kit.names == []


def test_a_prefix_keeps_within_a_sliding_window() -> None:
    """Layers that see everything take one, and so do those whose window holds it."""
    specimen = EXTRA["modernbert"]
    kit = fresh_kit(specimen)
    kit.add("whole", PrefixTuning(length=8, layers="0"), seed=0)
    with kit.use("whole"):
        run(kit, text(specimen, "left"))
