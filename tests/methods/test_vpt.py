"""VPT: shallow and deep against a vision transformer written out, with the prompts after the class token.

The order of tokens, what each block overwrites, what the caller gets back; how prompts start; that the base stays
still while nothing but a visual prompt trains, and is recomputed all the same.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor

import kitout
from kitout import VPT, LoRA, PrefixTuning, Stack
from kitout.errors import TargetError
from laws.activate import assert_same, fresh_kit, pristine, put_on, run
from zoo import IMAGE, LABELS, ZOO, out

SPECIES = ("vit", "dinov2", "timm-vit")
DEEP, SHALLOW = VPT(length=3, deep=True), VPT(length=4)


def active_kit(name: str, method: VPT) -> kitout.Kit:
    kit = fresh_kit(ZOO[name])
    put_on(kit, method, "v")
    kit.use("v")
    return kit


def prompts(kit: kitout.Kit, name: str = "v") -> dict[int, Tensor]:
    """The tokens of each block that has its own."""
    return {s.layer: kit[name].delta(s).token_vectors().detach() for s in kit[name].sites}


# --- by hand ----------------------------------------------------------------------------------------------------------


def attention(x: Tensor, w: dict[str, Tensor], path: str) -> Tensor:
    q, k, v = (F.linear(x, w[f"{path}.{p}_proj.weight"], w[f"{path}.{p}_proj.bias"]) for p in "qkv")
    q, k, v = (t.unflatten(-1, (4, 12)).transpose(1, 2) for t in (q, k, v))
    y = torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1) @ v
    return F.linear(y.transpose(1, 2).flatten(2), w[f"{path}.o_proj.weight"], w[f"{path}.o_proj.bias"])


def norm(x: Tensor, w: dict[str, Tensor], path: str) -> Tensor:
    return F.layer_norm(x, (48,), w[f"{path}.weight"], w[f"{path}.bias"], 1e-12)


def block(x: Tensor, w: dict[str, Tensor], path: str) -> Tensor:
    x = x + attention(norm(x, w, f"{path}.layernorm_before"), w, f"{path}.attention")
    h = F.gelu(F.linear(norm(x, w, f"{path}.layernorm_after"), w[f"{path}.mlp.fc1.weight"], w[f"{path}.mlp.fc1.bias"]))
    return x + F.linear(h, w[f"{path}.mlp.fc2.weight"], w[f"{path}.mlp.fc2.bias"])


def by_hand(pixels: Tensor, new: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the stream [B, 1 + p + N, d] after each block. new: prompts put in, or overwritten, by block."""
    w = pristine("vit").state_dict()
    stem = "vit.embeddings.patch_embeddings.projection"
    patches = F.conv2d(pixels, w[f"{stem}.weight"], w[f"{stem}.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((w["vit.embeddings.cls_token"].expand(len(pixels), -1, -1), patches), 1)
    x = x + w["vit.embeddings.position_embeddings"]
    streams, width = [], 0
    for i in range(3):
        if i in new:
            x = torch.cat((x[:, :1], new[i].expand(len(x), -1, -1), x[:, 1 + width :]), 1)
            width = len(new[i])
        x = block(x, w, f"vit.layers.{i}")
        streams.append(x)
    cls = norm(x, w, "vit.layernorm")[:, 0]
    return F.linear(cls, w["classifier.weight"], w["classifier.bias"]), streams


METHODS = {
    "shallow": SHALLOW,
    "deep": DEEP,
    "shared": VPT(length=3, deep=True, share=True),
    "projected": VPT(length=3, deep=True, projection=5),
    "late": VPT(length=2, deep=True, layers="last:2"),
    "late shallow": VPT(length=2, layers="1-2"),
}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_visual_prompts_are_tokens_after_the_class_token(method: VPT) -> None:
    kit, pixels = active_kit("vit", method), ZOO["vit"].batch(2, 0)["pixel_values"]
    assert_same(run(kit, {"pixel_values": pixels}), by_hand(pixels, prompts(kit))[0])


@torch.no_grad()
def test_deep_prompts_that_a_shallow_one_would_have_made_change_nothing() -> None:
    """Each later block is given what stood in its slots anyway."""
    kit, pixels = active_kit("vit", SHALLOW), ZOO["vit"].batch(1, 0)["pixel_values"]
    shallow = run(kit, {"pixel_values": pixels})
    (start,) = prompts(kit).values()
    _, streams = by_hand(pixels, {0: start})
    kit.add("deep", VPT(length=4, deep=True))
    for site, slots in zip(kit["deep"].sites, [start[None], *(x[:, 1:5] for x in streams)], strict=False):
        kit["deep"].delta(site).prompt.copy_(slots[0])
    with kit.use("deep"):
        assert_same(run(kit, {"pixel_values": pixels}), shallow)


@torch.no_grad()
def test_a_stack_of_visual_prompts_is_all_their_tokens() -> None:
    kit, pixels = active_kit("vit", SHALLOW), ZOO["vit"].batch(2, 0)["pixel_values"]
    put_on(kit, VPT(length=2), "w", seed=1)
    both = {0: torch.cat((prompts(kit)[0], prompts(kit, "w")[0]))}
    for route in (Stack("v", "w"), Stack("w", "v")):
        with kit.use(route):
            assert_same(run(kit, {"pixel_values": pixels}), by_hand(pixels, both)[0])


# --- what comes back --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", [SHALLOW, DEEP, METHODS["late"]])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_the_caller_gets_the_tokens_of_the_image_back(name: str, method: VPT) -> None:
    kit = kitout.attach(ZOO[name].build().base_model)
    batch = ZOO[name].batch(2, 0)
    put_on(kit, method, "v")
    kit.use("v")
    made = kit(**batch)
    assert made.last_hidden_state.shape == (2, 17, 48)
    if name == "vit":
        pixels = batch["pixel_values"]
        _, streams = by_hand(pixels, prompts(kit))
        w = {f"vit.{k}": v for k, v in kit.base.state_dict().items()}
        kept = torch.cat((streams[-1][:, :1], streams[-1][:, -16:]), 1)
        assert_same(made.last_hidden_state, norm(kept, w, "vit.layernorm"))


# --- how it starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIES)
def test_prompts_start_at_the_scale_of_the_patches(name: str) -> None:
    kit = fresh_kit(ZOO[name])
    for method, width in ((VPT(length=200, deep=True), 48), (VPT(length=200, deep=True, projection=30), 30)):
        adapter = kit.add("v", method, seed=0)
        drawn = torch.cat([adapter.delta(s).prompt.detach().flatten() for s in adapter.sites])
        bound = math.sqrt(6 / (3 * 8**2 + width))
        assert drawn.abs().max() == pytest.approx(bound, rel=0.01)
        assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        if method.projection:
            weight = adapter.shared.projection.weight.detach()
            assert weight.shape == (48, 30)
            assert weight.std() == pytest.approx(math.sqrt(2 / 48), rel=0.1)  # kaiming normal, fan out
        kit.remove("v")


# --- training ---------------------------------------------------------------------------------------------------------


def with_dropout() -> kitout.Kit:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    drops = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}
    config = tf.ViTConfig(image_size=IMAGE, patch_size=8, num_labels=LABELS, **sizes, **drops)
    return kitout.attach(tf.ViTForImageClassification(config))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_in_eval_mode_while_a_visual_prompt_trains(checkpointing: bool) -> None:
    kit, batch = with_dropout(), ZOO["vit"].batch(2, 0)
    if checkpointing:
        kit.gradient_checkpointing_enable()
    kit.add("v", VPT(length=3, deep=True), seed=0)
    kit.use("v")
    kit.train()
    assert kit.training
    assert kit["v"].training
    calls: list[bool] = []
    hook = kit.base.vit.layers[1].attention.register_forward_hook(lambda *_: calls.append(True))
    logits = out(kit(**batch))
    assert torch.equal(out(kit(**batch)), logits)
    calls.clear()
    out(kit(**batch)).square().sum().backward()
    hook.remove()
    assert len(calls) == 1 + checkpointing  # once more in the backward pass
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in kit.parameters())
    kit.add("l", LoRA(rank=2), seed=0)  # whose paper trains it under the base's dropout
    assert not torch.equal(out(kit(**batch)), out(kit(**batch)))
    kit.train_only("v")
    assert torch.equal(out(kit(**batch)), out(kit(**batch)))
    kit.train_only("l")
    assert not torch.equal(out(kit(**batch)), out(kit(**batch)))
    kit.eval()
    assert torch.equal(out(kit(**batch)), out(kit(**batch)))


def test_gradients_under_recomputation_are_the_same() -> None:
    grads = []
    for checkpointing in (False, True):
        kit = with_dropout()
        if checkpointing:
            kit.gradient_checkpointing_enable()
        adapter = kit.add("v", VPT(length=3, deep=True), seed=0)
        kit.use("v")
        kit.train()
        out(kit(**ZOO["vit"].batch(2, 0))).square().sum().backward()
        grads.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_same(a, b, 1e-6)


def test_a_dropout_of_its_own_acts_on_the_prompts() -> None:
    kit, batch = with_dropout(), ZOO["vit"].batch(2, 0)
    kit.add("v", VPT(length=3, dropout=0.5), seed=0)
    kit.use("v")
    kit.train()
    assert not torch.equal(out(kit(**batch)), out(kit(**batch)))
    kit.eval()
    assert torch.equal(out(kit(**batch)), out(kit(**batch)))


# --- rows and refusals ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SPECIES)
def test_rows_with_all_kinds_of_visual_prompts(name: str) -> None:
    kit = fresh_kit(ZOO[name])
    for i, (n, m) in enumerate({**METHODS, "lora": LoRA(rank=3), "prefix": PrefixTuning(length=2)}.items()):
        put_on(kit, m, n.replace(" ", "-"), seed=i)
    routes = [
        "deep",
        "shallow",
        "late",
        None,
        "lora",
        Stack("lora", "deep"),
        "prefix",
        Stack("prefix", "shallow"),
        "late-shallow",
    ]
    batch = ZOO[name].batch(len(routes), 0)
    with kit.use(routes):
        together = run(kit, batch)
    for row, route in enumerate(routes):
        with kit.use(route):
            assert_same(together[row], run(kit, {k: v[row : row + 1] for k, v in batch.items()})[0], what=f"{route}")


@pytest.mark.parametrize("name", ["swin", "llama", "bert", "t5"])
def test_what_has_no_image_in_one_sequence_is_refused(name: str) -> None:
    kit = fresh_kit(ZOO[name])
    for method in (VPT(length=3), VPT(length=3, deep=True)):
        with pytest.raises(TargetError, match="PromptTuning is for text" if ZOO[name].is_text else "within windows"):
            kit.add("v", method)
    assert kit.names == []
