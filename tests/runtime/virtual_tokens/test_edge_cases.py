"""Corners of prompts, prefixes and visual prompts that were once wrong in silence: right now, or they say why not."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Backbone,
    Dinov2Config,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
)

import kitout
from kitout import VPT, Kit, LoRA, PrefixTuning, PromptTuning, Stack
from kitout.errors import RouteError, TargetError
from laws.activate import assert_same, run, untrivial
from zoo import ZOO, image_batch, seq2seq_batch, text_batch

AFTER = PromptTuning(length=4, place="after", init=(5, 6, 7, 8))


def kit_of(name: str, **methods: kitout.Method) -> Kit:
    kit = kitout.attach(ZOO[name].build())
    for key, method in methods.items():
        kit.add(key, method, seed=0)
    return kit


def with_prompt_after(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:, :1], torch.tensor([[5, 6, 7, 8]]).expand(len(ids), -1), ids[:, 1:]], 1)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_mask_of_other_values_than_one_counts_its_positions(name: str) -> None:
    kit, batch = kit_of(name, a=PrefixTuning(length=3)), ZOO[name].batch(2, 0)
    untrivial(kit["a"])
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -2:] = 0
    kit.use("a")
    with torch.no_grad():
        assert_same(run(kit, {**batch, "attention_mask": 2 * mask}), run(kit, {**batch, "attention_mask": mask}))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_prompt_after_the_first_token_without_mask_or_cache(name: str) -> None:
    kit, ids = kit_of(name, a=AFTER), text_batch(3)["input_ids"]
    want = run(kit, {"input_ids": with_prompt_after(ids)})[:, 5:]
    kit.use("a")
    with torch.no_grad():
        assert_same(kit(input_ids=ids, use_cache=False).logits[:, 1:], want)


def test_a_prompt_after_the_first_token_of_padded_rows_in_a_static_cache() -> None:
    kit, ids = kit_of("llama", a=AFTER), text_batch(2)["input_ids"]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) > 2).long().expand(2, -1)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    want = kit.generate(with_prompt_after(ids), **settings)[:, -5:]
    kit.use("a")
    for cache in (None, "static"):
        got = kit.generate(padded, attention_mask=mask, cache_implementation=cache, **settings)
        assert torch.equal(got[:, -5:], want)
    with pytest.raises(RouteError, match="all padding"):
        kit.generate(padded, attention_mask=mask, prefill_chunk_size=3, **settings)


def test_a_prompt_between_prefixes_and_another_is_not_lost() -> None:
    kit = kit_of("llama", p=PromptTuning(length=2), q=PromptTuning(length=3), k=PrefixTuning(length=4))
    kit.use(Stack("p", "k", "q"))
    run_loss = kit(**text_batch(2)).logits.square().sum()
    run_loss.backward()
    for name in ("p", "q", "k"):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kit[name].parameters()), name


def test_a_cache_goes_on_under_the_route_it_was_filled_under() -> None:
    kit, ids = kit_of("llama", a=PrefixTuning(length=3), b=PrefixTuning(length=5)), text_batch(2)["input_ids"]
    with torch.no_grad():
        cache = DynamicCache()
        with kit.use("a"):
            kit(input_ids=ids, past_key_values=cache)
            kit(input_ids=ids[:, :1], past_key_values=cache)
        with kit.use("b"), pytest.raises(RouteError, match=r"\[3, 3\].*\[5, 5\]"):
            kit(input_ids=ids[:, :1], past_key_values=cache)
        with kit.use(None), pytest.raises(RouteError, match="active route has none"):
            kit(input_ids=ids[:, :1], past_key_values=cache)


def test_positions_that_cannot_be_shifted_are_refused() -> None:
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 99}
    config = M2M100Config(**sizes, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80)
    kit = kitout.attach(M2M100ForConditionalGeneration(config).eval())
    kit.add("x", PrefixTuning(length=4, places="decoder"), seed=0)
    kit.use("x")
    with pytest.raises(RouteError, match="counts its positions itself"):
        kit(**seq2seq_batch(2))


def test_a_mask_that_carries_a_bias_is_no_place_for_keys() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = FalconConfig(**sizes, alibi=True, new_decoder_architecture=False, multi_query=False)
    kit = kitout.attach(FalconForCausalLM(config).eval())
    with pytest.raises(TargetError, match="bias by position"):
        kit.add("x", PrefixTuning(length=4))


def test_a_stack_that_takes_no_vectors_is_refused_at_once() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    kit = kitout.attach(CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=99, eos_token_id=2)).eval())
    with pytest.raises(TargetError, match="inputs_embeds"):
        kit.add("x", PromptTuning(length=4))


def test_the_active_route_does_not_change_how_an_adapter_starts() -> None:
    kit = kit_of("llama", e=LoRA(targets="embed"), a=PromptTuning(length=3))
    untrivial(kit["e"])
    kit.use("e")
    kit.add("b", PromptTuning(length=3), seed=0)
    kit.use(["e", None, "e"])
    kit.add("c", PromptTuning(length=3), seed=0)
    for name in "bc":
        assert torch.equal(next(kit[name].parameters()), next(kit["a"].parameters()))


def test_a_kit_that_has_run_a_prompt_still_copies_and_pickles(tmp_path: Path) -> None:
    kit, batch = kit_of("llama", a=PromptTuning(length=3)), text_batch(2)
    kit.use("a")
    kit(**batch).logits.sum().backward()
    want = run(kit, batch)
    assert torch.equal(run(copy.deepcopy(kit), batch), want)
    file = io.BytesIO()
    torch.save(kit, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), batch), want)


def test_hidden_states_of_a_visual_prompt_have_the_images_own_tokens() -> None:
    for name in ("vit", "dinov2"):
        kit = kit_of(name, v=VPT(length=4, deep=True))
        kit.use("v")
        states = kit(**image_batch(2), output_hidden_states=True).hidden_states
        assert {s.shape[1] for s in states} == {17}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    config = Dinov2Config(**sizes, image_size=32, patch_size=8, out_features=["stage1", "stage2"])
    kit = kitout.attach(Dinov2Backbone(config).eval())
    kit.add("v", VPT(length=4))
    kit.use("v")
    with pytest.raises(RouteError, match="feature maps"):
        kit(**image_batch(2))


def test_tuples_are_trimmed_as_outputs_are() -> None:
    kit = kit_of("t5", p=PromptTuning(length=4))
    kit.use("p")
    logits, *rest = kit(**seq2seq_batch(2), return_dict=False)
    assert logits.shape[1] == 5
    assert {t.shape[1] for t in rest if isinstance(t, torch.Tensor)} == {7}


def test_states_without_the_prompt_are_not_taken_for_states_with_it() -> None:
    kit, batch = kit_of("t5", p=PromptTuning(length=4)), seq2seq_batch(2)
    kit.use("p")
    with torch.no_grad():
        narrow = kit(**batch).encoder_last_hidden_state
        wide = kit.base.get_encoder()(**text_batch(2))
        want = run(kit, batch)
        rest = {k: v for k, v in batch.items() if k != "input_ids"}
        assert_same(kit(**rest, encoder_outputs=wide).logits, want)
        with pytest.raises(RouteError, match="encoder_outputs"):
            kit(**rest, encoder_outputs=(narrow,))
