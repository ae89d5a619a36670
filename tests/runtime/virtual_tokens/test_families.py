"""Prompts and prefixes in models that embed, count or mask in a way of their own, against the bare base.

The base is run on the widened sequence by hand: it is called where vectors, positions and masks are in plain sight (the
text model inside a model of images and text), or with placeholder ids over which its token table is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import kitout
from kitout import VPT, PrefixTuning, PromptTuning
from kitout.errors import RouteError, TargetError
from zoo import EXTRA, IMAGE, VOCAB, out, padded, randomize_model, text_batch

P = 4
TEXT = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MEDIA = 7  # the id of image tokens


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


def tokens(num_image_tokens: int) -> Tensor:
    ids = text_batch(2)["input_ids"].clamp_min(20)
    return torch.cat((torch.full((2, num_image_tokens), MEDIA), ids), 1)


def blip2() -> tuple[nn.Module, dict[str, Tensor]]:
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": IMAGE, "patch_size": 8},
        qformer_config={**vision, "encoder_hidden_size": 24},
        text_config={"model_type": "opt", "word_embed_proj_dim": 48, "ffn_dim": 80, **TEXT},
        num_query_tokens=5,
        image_token_index=MEDIA,
    )
    return transformers.Blip2ForConditionalGeneration(config), {"input_ids": tokens(5), "pixel_values": images(2)}


def qwen2_vl() -> tuple[nn.Module, dict[str, Tensor]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 3]}
    vision = {"depth": 1, "embed_dim": 24, "hidden_size": 48, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=MEDIA, video_token_id=8,
        vision_start_token_id=9, vision_end_token_id=10,
    )  # fmt: skip
    ids = tokens(4)
    patches = torch.randn(32, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": patches, "input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    batch |= {"mm_token_type_ids": (ids == MEDIA).int(), "attention_mask": torch.ones_like(ids)}
    return transformers.Qwen2VLForConditionalGeneration(config), batch


def paligemma() -> tuple[nn.Module, dict[str, Tensor]]:
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.PaliGemmaConfig(
        vision_config={**vision, "image_size": IMAGE, "patch_size": 8, "model_type": "siglip_vision_model",
                       "vision_use_head": False, "projection_dim": 48},
        text_config={"model_type": "gemma", "head_dim": 12, **TEXT}, image_token_id=MEDIA, projection_dim=48,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), {"input_ids": tokens(16), "pixel_values": images(2)}


def layoutlm() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LayoutLMConfig(**TEXT, max_2d_position_embeddings=32)
    corners = torch.randint(0, 10, (2, 7, 2), generator=torch.Generator().manual_seed(0))
    batch = {**text_batch(2), "bbox": torch.cat((corners, corners + 3), -1)}
    return transformers.LayoutLMForTokenClassification(config), batch


def kit_with(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], method: kitout.Method) -> Any:
    model, batch = build()
    model = randomize_model(model, 0)
    kit = kitout.attach(model, example_batch=batch)
    kit.add("x", method, seed=0)
    return kit, batch


@contextmanager
def calls_of(module: nn.Module, calls: list[tuple[dict[str, Any], Any]]) -> Any:
    hook = module.register_forward_hook(lambda m, args, kwargs, o: calls.append((kwargs, o)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def inner_calls(kit: Any, batch: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """The text model inside, what it is called with without an adapter, and what it returns under x."""
    runner = kit.base.get_submodule(kit.survey.towers[-1].block_runner)
    calls: list[Any] = []
    with calls_of(runner, calls):
        kit(**batch)
        with kit.use("x"):
            kit(**batch)
    return runner, calls[0][0], out(calls[-1][1])


@torch.no_grad()
@pytest.mark.parametrize("build", [blip2, qwen2_vl])
def test_a_prompt_is_text_before_the_images(build: Any) -> None:
    kit, batch = kit_with(build, PromptTuning(length=P))
    runner, call, active = inner_calls(kit, batch)
    vectors = kit["x"].delta(kit["x"].sites[0]).token_vectors()
    embeds = torch.cat((vectors.expand(2, -1, -1), call["inputs_embeds"]), 1)
    more = {"attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}
    if (positions := call.get("position_ids")) is not None:  # along several axes
        before = torch.arange(P).expand(*positions.shape[:-1], -1)
        more["position_ids"] = torch.cat((before, positions + P), -1)
    expected = out(runner(inputs_embeds=embeds, **more))[:, P:]
    torch.testing.assert_close(active, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prefix_moves_positions_along_every_axis() -> None:
    kit, batch = kit_with(qwen2_vl, PrefixTuning(length=P))
    runner, call, active = inner_calls(kit, batch)
    cache = DynamicCache()
    for layer, site in enumerate(kit["x"].sites):
        k, v = kit["x"].delta(site).key_values()
        cache.update(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), layer)
    expected = runner(
        inputs_embeds=call["inputs_embeds"],
        attention_mask=torch.ones(2, P + call["inputs_embeds"].shape[1], dtype=torch.long),
        position_ids=call["position_ids"] + P,
        past_key_values=cache,
    )
    assert call["position_ids"].unique(dim=0).shape[0] > 1  # the axes differ
    torch.testing.assert_close(active, out(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prefix_generates_with_positions_of_several_axes() -> None:
    kit, batch = kit_with(qwen2_vl, PrefixTuning(length=P))
    with kit.use("x"):
        ids = kit.base.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = kit.base.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(ids, again)


@contextmanager
def overwritten(table: nn.Module, vectors: Tensor) -> Any:
    """The first columns of what the token table returns are these vectors."""

    def overwrite(_module: nn.Module, _args: Any, value: Tensor) -> Tensor:
        return torch.cat((vectors.to(value.dtype).expand(value.shape[0], -1, -1), value[:, len(vectors) :]), 1)

    hook = table.register_forward_hook(overwrite)
    try:
        yield
    finally:
        hook.remove()


def zoo_text(name: str) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    return lambda: (EXTRA[name].build(), text_batch(2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "placeholder"),
    [(layoutlm, 20), (paligemma, 20), (zoo_text("gemma3n"), 0), (zoo_text("gemma4"), 0)],
    ids=["layoutlm", "paligemma", "gemma3n", "gemma4"],
)
def test_a_prompt_is_what_the_base_computes_of_the_longer_text(build: Any, placeholder: int) -> None:
    kit, batch = kit_with(build, PromptTuning(length=P))
    with kit.use("x"):
        active = out(kit(**batch))
    (site,) = kit["x"].sites
    longer = {
        name: torch.cat((torch.zeros_like(value[:, :P]), value), 1) if name in ("input_ids", "bbox") else value
        for name, value in batch.items()
    }
    longer["input_ids"][:, :P] = placeholder
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    kit.use(None)
    with overwritten(kit.base.get_submodule(site.path), kit["x"].delta(site).token_vectors()):
        expected = out(kit(**longer))[:, P:]
    torch.testing.assert_close(active, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "falcon-mq"])
@pytest.mark.parametrize(
    "method", [PrefixTuning(length=P), PromptTuning(length=P), PromptTuning(length=P, place="after")]
)
def test_rows_generate_as_alone_and_without_a_cache(name: str, method: kitout.Method) -> None:
    kit = kitout.attach(EXTRA[name].build())
    kit.add("x", method, seed=0)
    kit.add("y", method.model_copy(update={"length": 2}), seed=1)
    batch = padded(text_batch(3, 1), [7, 5, 4], "left")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with kit.use(["x", "y", None]):
        together = kit.base.generate(**batch, **settings)[:, -4:]
        assert torch.equal(kit.base.generate(**batch, **settings, use_cache=False)[:, -4:], together)
    for row, entry in enumerate(["x", "y", None]):
        ids = batch["input_ids"][row, batch["attention_mask"][row].bool()][None]
        with kit.use(entry):
            assert torch.equal(kit.base.generate(ids, **settings)[0, -4:], together[row])


@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_all() -> None:
    kit = kitout.attach(EXTRA["gemma4"].build())
    kit.add("x", PromptTuning(length=P, place="after"), seed=0)
    batch, kept = padded(text_batch(3, 1), [7, 5, 4], "left"), torch.tensor([3, 0, 5])
    kit.use("x")
    expected = out(kit(**batch))
    torch.testing.assert_close(out(kit(**batch, logits_to_keep=2)), expected[:, -2:])
    some, real = out(kit(**batch, logits_to_keep=kept)), batch["attention_mask"][:, kept].bool()
    torch.testing.assert_close(some[real], expected[:, kept][real])


def test_a_value_for_each_token_that_is_not_known_is_refused() -> None:
    kit, batch = kit_with(layoutlm, PromptTuning(length=P))
    embedder = kit.base.get_submodule(kit.survey.towers[0].embedder)
    kit.use("x")
    with pytest.raises(RouteError, match=r"weights of shape .* has a value for each of 7 tokens"):
        embedder(**batch, weights=torch.ones(2, 7))


BEIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}


@pytest.mark.parametrize("bias", ["use_shared_relative_position_bias", "use_relative_position_bias"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_image_tokens_without_a_bias_are_refused(bias: str, attention: str) -> None:
    config = transformers.BeitConfig(
        **BEIT, image_size=IMAGE, patch_size=8, attn_implementation=attention, **{bias: True}
    )
    kit = kitout.attach(transformers.BeitForImageClassification(config).eval())

    def run() -> None:
        kit.add("x", VPT(length=3), seed=0)
        with kit.use("x"):
            kit(pixel_values=images(2))

    with pytest.raises(
        (TargetError, RouteError), match=r"bias by position|visual prompts do not fit|Visual prompts do not fit"
    ):
        run()


def test_images_with_rows_and_columns_have_no_place_for_tokens() -> None:
    config = transformers.VitDetConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE)
    kit = kitout.attach(transformers.VitDetModel(config).eval())
    with pytest.raises(TargetError, match="keeps rows and columns"):
        kit.add("x", VPT(length=3))


def mean_pooled_at_eos() -> nn.Module:
    config = transformers.Aimv2TextConfig(**TEXT, projection_dim=48, eos_token_id=2)
    return transformers.Aimv2TextModel(config).eval()


def test_a_pooling_that_looks_its_token_up_in_the_ids_is_refused() -> None:
    kit = kitout.attach(mean_pooled_at_eos())
    assert not kit.survey.towers[0].causal
    with pytest.raises(TargetError, match="reads its ids or mask again"):
        kit.add("x", PromptTuning(length=P))


def roformer() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.RoFormerConfig(**TEXT, embedding_size=48)
    return transformers.RoFormerForTokenClassification(config), text_batch(2)


@torch.no_grad()
def test_positions_looked_up_once_for_all_rows() -> None:
    kit, batch = kit_with(roformer, PromptTuning(length=P))
    with kit.use("x"):
        assert out(kit(**batch)).shape == (2, 7, 2)
    with kit.use(["x", None]), pytest.raises(RouteError, match="looked up once for all rows"):
        kit(**batch)
