"""Rows with prompts or prefixes of other lengths, or none, in one batch: none sees another's, on any kind of model.

Each case is a kind of model on which one row changed another in silence, or the batch crashed. A row alone is the same
row in a batch of one.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn

import kitout
from kitout import Kit, LoRA, PrefixTuning, PromptTuning, Stack
from kitout.errors import RouteError
from laws.activate import assert_same, put_on, run
from zoo import IMAGE, ZOO, padded, randomize_model, rows_of, text_batch

TEXT = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 2}
ENCODER = {**TEXT, "max_position_embeddings": 64, "pad_token_id": 0}


def made(model: str, config: str, **settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize_model(getattr(hf, model)(getattr(hf, config)(**settings)), 0)


def kit_with(model: nn.Module, **methods: object) -> Kit:
    kit = kitout.attach(model)
    for seed, (name, method) in enumerate(methods.items()):
        put_on(kit, method, name, seed=seed)
    return kit


def assert_as_alone(kit: Kit, batch: dict[str, torch.Tensor], rows: list) -> None:
    with kit.use(rows):
        together = run(kit, batch)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            assert_same(together[i : i + 1], run(kit, rows_of(batch, i)), what=f"row {i} with {entry}")


@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("name", ["bert", "t5", "bart", "vit"])
def test_prefixes_where_attention_is_written_out_and_no_mask_is_given(name: str, mask: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    model.set_attn_implementation("eager")
    kit = kitout.attach(model)
    places = {"places": "encoder decoder cross"} if name in ("t5", "bart") else {}
    put_on(kit, PrefixTuning(length=5, **places), "long")
    put_on(kit, PrefixTuning(length=3, **places), "short", seed=1)
    put_on(kit, LoRA(rank=2), "lora", seed=2)
    batch = specimen.batch(4, 0)
    if mask == "none":
        batch.pop("attention_mask", None)
    assert_as_alone(kit, batch, ["long", None, "short", "lora"])


def test_a_cross_prefix_where_the_decoder_makes_its_own_mask() -> None:
    model = made(
        "LongT5ForConditionalGeneration", "LongT5Config", vocab_size=99, d_model=48, d_kv=16, d_ff=80, num_layers=2,
        num_heads=4, local_radius=4, relative_attention_num_buckets=8, relative_attention_max_distance=20,
        decoder_start_token_id=0,
    )  # fmt: skip
    kit = kit_with(model, cross=PrefixTuning(length=4, places="cross"), lora=LoRA(rank=2))
    assert_as_alone(kit, ZOO["t5"].batch(4, 0), ["cross", None, "lora", Stack("cross", "lora")])


def test_prompts_where_a_table_is_read_with_its_neighbors() -> None:
    """A row with a shorter prompt gets columns behind it, which are zero as beyond the end of the row alone."""
    model = made("MobileBertModel", "MobileBertConfig", **ENCODER, embedding_size=24, intra_bottleneck_size=24)
    kit = kit_with(model, long=PromptTuning(length=5), short=PromptTuning(length=2, place="after"), lora=LoRA(rank=2))
    rows = ["long", None, "short", "lora"]
    assert_as_alone(kit, text_batch(4), rows)
    assert_as_alone(kit, padded(text_batch(4), [7, 4, 6, 5], "right"), rows)


@pytest.mark.parametrize(
    "build",
    [
        partial(made, "ConvBertModel", "ConvBertConfig", **ENCODER, embedding_size=48),
        partial(
            made, "NystromformerModel", "NystromformerConfig", **ENCODER, num_landmarks=64, segment_means_seq_len=64
        ),
    ],
    ids=["convbert", "nystromformer"],
)
def test_prompts_of_other_lengths_are_refused_where_padding_is_seen(build: partial[nn.Module]) -> None:
    kit = kit_with(build(), long=PromptTuning(length=5), short=PromptTuning(length=2), other=PromptTuning(length=5))
    for rows in (["long", "short"], ["long", None]):
        with pytest.raises(RouteError, match=r"prompts of .* tokens"):
            kit.use(rows)
    assert_as_alone(kit, text_batch(2), ["long", "other"])


def hybrid() -> nn.Module:
    return made(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **{**ENCODER, "num_hidden_layers": 3},
        num_key_value_heads=1, lru_width=48, attention_window_size=32, head_dim=12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def test_a_recurrence_begins_anew_behind_a_prefix() -> None:
    """Blocks without attention see no prefix: they compute what they compute without one, in every call."""
    kit = kit_with(hybrid(), long=PrefixTuning(length=5), short=PrefixTuning(length=3))
    batch = text_batch(3)
    states: dict[str, torch.Tensor] = {}
    for i in (0, 1):
        block = kit.base.model.layers[i]
        block.register_forward_hook(lambda _m, _x, out, i=i: states.__setitem__(str(i), out.clone()))
    run(kit, batch)
    base = dict(states)
    rows = ["long", None, "short"]
    with kit.use(rows):
        run(kit, batch)
    for i in ("0", "1"):
        assert_same(states[i], base[i], what=f"block {i}")
    assert_as_alone(kit, padded(batch, [7, 4, 6], "left"), rows)
    with kit.use(rows):
        caches = [hf.DynamicCache(config=kit.config) for _ in range(2)]
        first, again = (run(partial(kit, past_key_values=c, use_cache=True), batch) for c in caches)
    assert_same(again, first, what="the same call once more")


DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "own keys"])
def test_a_position_table_that_is_folded_into_heads_has_one_value_for_all_rows(shared: bool) -> None:
    model = made(
        "DebertaV2Model", "DebertaV2Config", **ENCODER, **DEBERTA, position_buckets=8, share_att_key=shared
    )  # fmt: skip
    folded = "query_proj" if shared else "pos_query_proj"
    paths = " ".join(p for p, _ in model.named_modules() if p.endswith(f".{folded}"))
    kit = kit_with(
        model, value=LoRA(rank=2, targets="attn.v mlp.*"), down=LoRA(rank=3, targets="mlp.down"),
        folded=LoRA(rank=2, targets=paths), other=LoRA(rank=2, targets=paths),
    )  # fmt: skip
    assert_as_alone(kit, text_batch(3), ["value", None, "down"])
    assert_as_alone(kit, text_batch(3), [Stack("folded", "value"), "folded", Stack("folded", "down")])
    for rows in (["folded", None], ["folded", "other"]):
        with kit.use(rows), pytest.raises(RouteError, match="one adapter for the whole batch"):
            run(kit, text_batch(2))


@pytest.mark.parametrize("search", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_whisper_multiplies_its_rows_before_its_encoder_runs(search: dict[str, int]) -> None:
    model = made(
        "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=99, d_model=48, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80,
        num_mel_bins=8, max_source_positions=20, max_target_positions=IMAGE, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    sound = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))
    example = {"input_features": sound[:2], "decoder_input_ids": torch.tensor([[3, 7], [3, 9]])}
    kit = kitout.attach(model, example_batch=example)
    put_on(kit, LoRA(rank=2, targets="all-linear"), "lora")
    put_on(kit, PrefixTuning(length=3), "prefix", seed=1)
    rows, settings = ["lora", None, "prefix"], {"max_new_tokens": 4, "min_new_tokens": 4, **search}
    with kit.use(rows):
        together = kit.generate(sound, **settings)
    per_row = len(together) // len(rows)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            alone = kit.generate(sound[i : i + 1], **settings)
        assert torch.equal(together[i * per_row : (i + 1) * per_row], alone), f"row {i} with {entry}"


@torch.no_grad()
def test_keys_of_rows_are_made_on_the_device_of_the_model(tiny_llama: nn.Module) -> None:
    kit, batch = kitout.attach(tiny_llama), text_batch(2)
    for name, length in (("p", 4), ("q", 3)):
        put_on(kit, PrefixTuning(length=length), name)
    with kit.use(["p", "q"]):
        want = run(kit, batch)
        with torch.device("meta"):  # what names no device is there, and cannot be copied from it
            assert torch.equal(run(kit, batch), want)
