"""find_sites on real tiny models: what it labels, what it must not label, and its errors.

Expected labels are written out by hand for each design that has its own way to be wrong. Models are built from configs
on the meta device; one test checks that real weights give the same.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from kitout.base.find.find import find_sites
from kitout.base.survey import Survey
from kitout.cli.inspect import build_on_meta, render_table, render_text
from kitout.errors import NoBlocksFound, TargetError
from zoo import ZOO, Specimen

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}


def on_meta(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def roles_in(survey: Survey, block: str) -> dict[str, str]:
    """Path inside one block -> role, without the block itself."""
    inside = (s for s in survey.sites if s.path.startswith(f"{block}."))
    return {s.path[len(block) + 1 :]: s.role for s in inside}


def paths_with_role(survey: Survey, role: str) -> list[str]:
    return [s.path for s in survey.sites if s.role == role]


# --- every design of the zoo -----------------------------------------------------------------------------------------


def test_every_leaf_is_one_site(specimen: Specimen) -> None:
    model = specimen.build()
    survey = find_sites(model)
    leaves = [
        path
        for path, m in model.named_modules()
        if list(m.parameters(recurse=False)) and not any(list(c.parameters()) for c in m.children())
    ]
    paths = Counter(s.path for s in survey.sites if s.role != "block")
    assert set(paths) == set(leaves)
    assert set(paths.values()) == {1}
    assert all(survey.model.get_submodule(s.path) is s.module for s in survey.sites)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    assert [order[s.path] for s in survey.sites] == sorted(order[s.path] for s in survey.sites)


def test_every_block_is_resolved(specimen: Specimen) -> None:
    survey = find_sites(specimen.build())
    assert len(survey.blocks) == specimen.layers
    assert all(block.resolved for block in survey.blocks)
    assert sum(tower.depth for tower in survey.towers) == specimen.layers
    assert survey.towers[0].width == specimen.width
    assert paths_with_role(survey, "block") == [block.path for block in survey.blocks]


def test_widths_are_those_of_the_weights(specimen: Specimen) -> None:
    for site in find_sites(specimen.build()).sites:
        if isinstance(site.module, nn.Linear):
            assert site.module.weight.shape == (site.d_out, site.d_in)
            assert site.kind == "linear"
        elif site.kind == "linear":  # stored transposed
            assert site.module.weight.shape == (site.d_in, site.d_out)
        elif site.kind == "conv":
            assert site.channels_first
            assert site.module.weight.shape[0] == site.d_out


def test_meta_and_real_weights_agree_and_nothing_changes() -> None:
    real = ZOO["llama"].build()
    before = {name: (id(p), p.requires_grad) for name, p in real.named_parameters()}
    attributes = {path: set(m.__dict__) for path, m in real.named_modules()}
    survey = find_sites(real)
    assert {name: (id(p), p.requires_grad) for name, p in real.named_parameters()} == before
    assert {path: set(m.__dict__) for path, m in real.named_modules()} == attributes
    shadow = find_sites(on_meta(type(real), real.config))
    assert shadow.sites == survey.sites
    assert shadow.blocks == survey.blocks


def test_no_forward_is_run() -> None:
    model = ZOO["gpt2"].build()
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    assert find_sites(model).blocks


# --- one expectation a design ----------------------------------------------------------------------------------------


def test_gated_decoder() -> None:
    survey = find_sites(on_meta(hf.LlamaForCausalLM, hf.LlamaConfig(**SMALL, num_key_value_heads=2)))
    assert roles_in(survey, "model.layers.1") == {
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.o_proj": "attn.o",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    }
    assert paths_with_role(survey, "embed") == ["model.embed_tokens"]
    assert paths_with_role(survey, "head") == ["lm_head"]
    final = survey.by_path("model.norm")
    assert (final.role, final.kind, final.layer, final.tower) == ("norm", "norm", None, "")
    key = survey.by_path("model.layers.1.self_attn.k_proj")
    assert (key.d_in, key.d_out, key.layer, key.tower) == (48, 24, 1, "model.layers")


def test_transposed_linears_and_a_fused_projection() -> None:
    survey = find_sites(on_meta(hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=48, n_layer=1, n_head=4)))
    fused = survey.by_path("transformer.h.0.attn.c_attn")
    assert (fused.role, fused.kind, fused.d_in, fused.d_out) == ("attn.qkv", "linear", 48, 144)
    assert roles_in(survey, "transformer.h.0")["attn.c_proj"] == "attn.o"
    assert roles_in(survey, "transformer.h.0")["mlp.c_proj"] == "mlp.down"
    positions = survey.by_path("transformer.wpe")
    assert (positions.role, positions.kind) == ("other", "embedding")


def test_output_outside_the_attention_module() -> None:
    survey = find_sites(on_meta(hf.BertForSequenceClassification, hf.BertConfig(**SMALL)))
    assert roles_in(survey, "bert.encoder.layer.0") == {
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.output.dense": "attn.o",
        "attention.output.LayerNorm": "norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "norm",
    }
    assert paths_with_role(survey, "embed") == ["bert.embeddings.word_embeddings"]
    assert paths_with_role(survey, "head") == ["classifier"]
    assert survey.by_path("bert.pooler.dense").role == "other"


def test_encoder_and_decoder_are_two_towers() -> None:
    config = hf.T5Config(d_model=48, d_kv=16, d_ff=80, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    survey = find_sites(on_meta(hf.T5ForConditionalGeneration, config))
    assert [(t.path, t.depth, t.width) for t in survey.towers] == [("encoder.block", 2, 48), ("decoder.block", 2, 48)]
    decoder = roles_in(survey, "decoder.block.1")
    assert decoder["layer.0.SelfAttention.o"] == "attn.o"
    assert decoder["layer.1.EncDecAttention.k"] == "cross.k"
    assert decoder["layer.1.EncDecAttention.o"] == "cross.o"
    assert decoder["layer.2.DenseReluDense.wi_0"] == "mlp.gate"
    assert decoder["layer.2.DenseReluDense.wi_1"] == "mlp.up"
    assert decoder["layer.2.DenseReluDense.wo"] == "mlp.down"
    assert survey.by_path("decoder.block.0.layer.0.SelfAttention.relative_attention_bias").kind == "embedding"
    assert paths_with_role(survey, "embed") == ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]


def test_text_and_vision_are_two_towers() -> None:
    config = hf.CLIPConfig(text_config=SMALL, vision_config=SMALL | {"hidden_size": 64, "image_size": 32})
    survey = find_sites(on_meta(hf.CLIPModel, config))
    assert [(t.path, t.width) for t in survey.towers] == [
        ("text_model.encoder.layers", 48),
        ("vision_model.encoder.layers", 64),
    ]
    assert paths_with_role(survey, "patch") == ["vision_model.embeddings.patch_embedding"]
    assert paths_with_role(survey, "embed") == ["text_model.embeddings.token_embedding"]


def test_pyramid_has_a_tower_a_stage() -> None:
    config = hf.SwinConfig(embed_dim=16, depths=[1, 2], num_heads=[2, 4], image_size=32)
    survey = find_sites(on_meta(hf.SwinForImageClassification, config))
    assert [(t.depth, t.width) for t in survey.towers] == [(1, 16), (2, 32)]
    assert paths_with_role(survey, "patch") == ["swin.embeddings.patch_embeddings.projection"]
    assert survey.by_path("swin.encoder.layers.0.downsample.reduction").layer is None


def test_a_block_that_widens_takes_the_width_it_writes() -> None:
    config = hf.HieraConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], image_size=[32, 32], num_query_pool=1)
    survey = find_sites(on_meta(hf.HieraModel, config))
    assert [(b.width, b.resolved) for b in survey.blocks] == [(16, True), (32, True)]


def test_a_shared_block_counts_once() -> None:
    survey = find_sites(on_meta(hf.AlbertModel, hf.AlbertConfig(**(SMALL | {"num_hidden_layers": 6}))))
    assert len(survey.blocks) == 1
    assert len(paths_with_role(survey, "attn.q")) == 1


def test_experts_in_one_parameter_are_no_site() -> None:
    config = hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    survey = find_sites(on_meta(hf.MixtralForCausalLM, config))
    assert all(block.resolved for block in survey.blocks)
    assert not any("experts" in s.path for s in survey.sites)
    assert not paths_with_role(survey, "mlp.down")
    router = survey.by_path("model.layers.0.mlp.gate")
    assert (router.role, router.kind, router.d_in, router.d_out) == ("other", "other", 48, 4)


def test_low_rank_projections_and_shared_experts() -> None:
    config = hf.DeepseekV3Config(
        **SMALL, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=20,
        first_k_dense_replace=1,
    )  # fmt: skip
    roles = roles_in(find_sites(on_meta(hf.DeepseekV3Model, config)), "layers.1")
    assert roles["self_attn.q_a_proj"] == roles["self_attn.q_b_proj"] == "attn.q"
    assert roles["self_attn.kv_b_proj"] == "attn.qkv"
    assert roles["self_attn.o_proj"] == "attn.o"
    assert roles["mlp.shared_experts.down_proj"] == "mlp.down"


def test_fused_gate_and_up() -> None:
    roles = roles_in(
        find_sites(on_meta(hf.Phi3Model, hf.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0))), "layers.0"
    )
    assert (roles["self_attn.qkv_proj"], roles["mlp.gate_up_proj"]) == ("attn.qkv", "mlp.up")


def test_lists_that_run_side_by_side_are_one_stack() -> None:
    survey = find_sites(on_meta(hf.XLMModel, hf.XLMConfig(emb_dim=48, n_layers=2, n_heads=4, vocab_size=99)))
    assert [(t.path, t.depth) for t in survey.towers] == [("attentions", 2)]
    assert all(block.resolved for block in survey.blocks)
    feed = survey.by_path("ffns.1.lin2")
    assert (feed.role, feed.tower, feed.layer) == ("mlp.down", "attentions", 1)
    assert not paths_with_role(survey, "block")  # no module's output is a block's


def test_bare_cross_attention_joins_the_blocks_beside_it() -> None:
    model = Toy(mlp=feed)
    model.cross_attn_layers = nn.ModuleList(Attention(32) for _ in range(2))
    survey = find_sites(model)
    assert [t.path for t in survey.towers] == ["layers"]
    assert survey.by_path("cross_attn_layers.1.q_proj").role == "cross.q"
    assert survey.by_path("cross_attn_layers.1.o_proj").layer == 1
    assert roles_in(survey, "layers.1")["attn.q_proj"] == "attn.q"
    assert paths_with_role(survey, "block") == ["layers.0", "layers.1"]


def test_attentions_kept_in_a_list_inside_the_block() -> None:
    def two_attentions() -> nn.Module:
        return nn.ModuleList([Attention(32), Attention(32)])

    survey = find_sites(Toy(layers=3, attention=False, attns=two_attentions, mlp=feed))
    assert [(t.path, t.depth) for t in survey.towers] == [("layers", 3)]
    assert len(paths_with_role(survey, "attn.o")) == 6


def test_blocks_with_names_of_their_own() -> None:
    model = nn.Module()
    model.trunk = nn.Sequential()
    for name in ("first", "second"):
        model.trunk.add_module(name, nn.ModuleDict({"attn": Attention(32), "mlp": feed()}))
    survey = find_sites(model)
    assert [(b.index, b.path) for b in survey.blocks] == [(0, "trunk.first"), (1, "trunk.second")]
    assert survey.by_path("trunk.second.mlp.fc2").layer == 1
    assert paths_with_role(survey, "block") == ["trunk.first", "trunk.second"]


def test_a_stack_of_which_some_blocks_attend() -> None:
    config = hf.JambaConfig(**SMALL, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2)
    config.num_hidden_layers = 4
    survey = find_sites(on_meta(hf.JambaModel, config))
    attending = [b.index for b in survey.blocks if b.has_attention]
    assert 0 < len(attending) < len(survey.blocks) == 4
    assert not any("mamba" in p for role in ("mlp.up", "mlp.down", "attn.qkv") for p in paths_with_role(survey, role))


def test_pointwise_convolutions_stand_in_for_linears() -> None:
    config = hf.SqueezeBertConfig(
        **(SMALL | {"intermediate_size": 96}), embedding_size=48, q_groups=2, k_groups=2, v_groups=2,
        post_attention_groups=1, intermediate_groups=2, output_groups=2,
    )  # fmt: skip
    survey = find_sites(on_meta(hf.SqueezeBertModel, config))
    assert all(block.resolved for block in survey.blocks)
    query = survey.by_path("encoder.layers.0.attention.query")
    assert (query.role, query.kind, query.channels_first) == ("attn.q", "conv", True)


def test_torchs_own_attention() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 40, batch_first=True)
    survey = find_sites(nn.ModuleDict({"decoder": nn.TransformerDecoder(layer, 2)}))
    roles = roles_in(survey, "decoder.layers.0")
    assert roles["self_attn.out_proj"] == "attn.o"
    assert roles["multihead_attn.out_proj"] == "cross.o"
    assert (roles["linear1"], roles["linear2"]) == ("mlp.up", "mlp.down")
    whole = survey.by_path("decoder.layers.0.self_attn")
    assert (whole.role, whole.port, whole.weight_name, whole.d_in, whole.d_out) == (
        "attn.qkv", "weight", "in_proj_weight", 16, 48
    )  # fmt: skip
    keys = [s for s in survey.sites if s.role == "cross.k"]
    assert [s.channels for s in keys] == [tuple(range(16, 32))] * 2


# --- look-alikes that get no role ------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))


class Toy(nn.Module):
    """Blocks of attention and whatever else a test adds to them."""

    def __init__(self, layers: int = 2, d: int = 32, attention: bool = True, **parts: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for block in self.layers:
            block.norm = nn.LayerNorm(d)
            if attention:
                block.attn = Attention(d)
            for name, make in parts.items():
                block.add_module(name, make())


def feed(d: int = 32, f: int = 96) -> nn.Module:
    return nn.ModuleDict({"fc1": nn.Linear(d, f), "fc2": nn.Linear(f, d)})


def test_a_key_that_feeds_a_value_is_a_feed_forward() -> None:
    def channel_mix() -> nn.Module:
        return nn.ModuleDict({"key": nn.Linear(32, 96), "value": nn.Linear(96, 32)})

    roles = roles_in(find_sites(Toy(ffn=channel_mix)), "layers.0")
    assert (roles["ffn.key"], roles["ffn.value"]) == ("mlp.up", "mlp.down")


def test_a_gated_convolution_is_neither_attention_nor_feed_forward() -> None:
    def mixer() -> nn.Module:
        return nn.ModuleDict(
            {"in_proj": nn.Linear(32, 96), "conv": nn.Conv1d(32, 32, 3, groups=32), "out_proj": nn.Linear(32, 32)}
        )

    roles = roles_in(find_sites(Toy(conv=mixer, mlp=feed)), "layers.0")
    assert roles["conv.in_proj"] == roles["conv.out_proj"] == "other"
    assert roles["attn.o_proj"] == "attn.o"
    assert roles["mlp.fc2"] == "mlp.down"


def test_routers_and_bottlenecks_have_no_role() -> None:
    def side() -> nn.Module:
        return nn.ModuleDict({"down": nn.Linear(32, 1), "up": nn.Linear(1, 32)})

    survey = find_sites(Toy(mlp=feed, router=lambda: nn.Linear(32, 4), side=side))
    assert roles_in(survey, "layers.0")["router"] == "other"
    assert roles_in(survey, "layers.0")["side.up"] == "other"
    assert survey.blocks[0].unlabeled == (
        ("layers.0.router", 32, 4),
        ("layers.0.side.down", 32, 1),
        ("layers.0.side.up", 1, 32),
    )
    assert survey.blocks[0].resolved


def test_square_feed_forward_goes_by_order() -> None:
    roles = roles_in(find_sites(Toy(mlp=lambda: feed(32, 32))), "layers.1")
    assert (roles["mlp.fc1"], roles["mlp.fc2"]) == ("mlp.up", "mlp.down")


def test_norms_inside_attention_do_not_set_the_width() -> None:
    def normed() -> nn.Module:
        module = Attention(32)
        for name in ("q_norm", "k_norm", "v_norm", "x_norm", "y_norm", "z_norm"):
            module.add_module(name, nn.RMSNorm(8))
        return module

    survey = find_sites(Toy(attention=False, attn=normed, mlp=feed))
    assert {block.width for block in survey.blocks} == {32}
    assert survey.by_path("layers.0.attn.q_norm").role == "norm"


def test_leaf_kinds() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(32))

    class Packed(nn.Module):
        """A quantized linear: packed buffers, and its features as attributes."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 32, 96
            self.register_buffer("qweight", torch.zeros(4, 96, dtype=torch.int32))

    parts = {"ls": Scale, "packed": Packed, "bn": lambda: nn.BatchNorm2d(32), "gn": lambda: nn.GroupNorm(2, 32)}
    survey = find_sites(Toy(mlp=feed, weighted=lambda: weight_norm(nn.Conv1d(32, 32, 3)), **parts))
    kinds = {p: (s.role, s.kind, s.channels_first) for s in survey.sites for p in [s.path.removeprefix("layers.0.")]}
    assert kinds["ls"] == ("other", "other", False)
    assert kinds["packed"] == ("other", "linear", False)
    assert kinds["bn"] == kinds["gn"] == ("other", "norm", True)
    assert kinds["weighted"] == ("other", "conv", True)
    assert not any("parametrizations" in path for path in kinds)


def test_tied_modules_and_repeated_blocks_come_once() -> None:
    model = Toy(layers=1, mlp=feed)
    model.layers.append(model.layers[0])
    model.alias = model.layers[0].attn
    survey = find_sites(model)
    assert len(survey.blocks) == 1
    assert paths_with_role(survey, "attn.q") == ["layers.0.attn.q_proj"]


# --- roles given by the user -----------------------------------------------------------------------------------------


def without_known_names() -> nn.Module:
    def mixer() -> nn.Module:
        return nn.ModuleDict({"first": nn.Linear(32, 96), "second": nn.Linear(32, 32)})

    return Toy(attention=False, mixer=mixer, mlp=feed)


def test_no_blocks_is_an_error_that_shows_how_to_give_roles() -> None:
    with pytest.raises(NoBlocksFound) as error:
        find_sites(without_known_names())
    text = str(error.value)
    assert "layers.*.mixer.first [32 -> 96] x2" in text
    assert 'kitout.attach(model, roles={r"mixer\\.in_proj$": "attn.qkv"})' in text


def test_roles_make_a_stack() -> None:
    survey = find_sites(without_known_names(), {r"mixer\.first$": "attn.qkv"})
    assert roles_in(survey, "layers.1")["mixer.second"] == "attn.o"  # found from the width once the attention is known
    assert roles_in(survey, "layers.1")["mlp.fc1"] == "mlp.up"
    assert all(block.resolved for block in survey.blocks)


def test_roles_override_what_was_inferred() -> None:
    survey = find_sites(Toy(mlp=feed), {r"layers\.1\..*\.fc2$": "other", r"o_proj$": "other"})
    assert roles_in(survey, "layers.0")["mlp.fc2"] == "mlp.down"
    assert roles_in(survey, "layers.1")["mlp.fc2"] == "other"
    assert not paths_with_role(survey, "attn.o")


def test_all_errors_of_roles_at_once() -> None:
    with pytest.raises(TargetError) as error:
        find_sites(without_known_names(), {r"mixer\.first$": "attn.qvk", r"nowhere": "attn.q", r"(": "attn.q"})
    text = str(error.value)
    assert "3 errors" in text
    assert "did you mean 'attn.qkv'" in text
    assert "'nowhere' matches no module" in text
    assert "is not a regular expression" in text


def test_by_path_suggests() -> None:
    survey = find_sites(Toy(mlp=feed))
    with pytest.raises(TargetError, match=r"did you mean .*layers\.0\.attn\.q_proj"):
        survey.by_path("layers.0.attn.qproj")


# --- kitout inspect --------------------------------------------------------------------------------------------------


def test_inspect_builds_a_folder_without_weights(tmp_path: Any) -> None:
    hf.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    model = build_on_meta(str(tmp_path))
    assert type(model) is hf.LlamaForCausalLM
    assert {p.device.type for p in model.parameters()} == {"meta"}
    text = render_text(find_sites(model))
    assert "attn.q" in text
    assert "48 -> 80" in text
    assert "tower model.layers: 2 blocks of width 48" in text
    assert render_table(find_sites(model)).row_count == len(text.splitlines()) - 2


def test_summary_lists_projections_without_a_role() -> None:
    text = render_text(find_sites(Toy(mlp=feed, router=lambda: nn.Linear(32, 4))))
    assert "no role: layers.*.router [32 -> 4] x2" in text
