"""Tiny models of many transformers families, built offline: what benchmarks/families.py runs kitout.check on.

A family is a line: model type, the Auto class, and what its config class needs besides the common sizes. `build` sets
every common size field that the config class and its nested configs have, and draws weights by a fixed seed so that
neither attention nor norms are trivial.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, FEED_FORWARD, DEPTH, VOCAB = 32, 4, 2, 8, 48, 2, 99
COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "width", "projection_dim",
                     "embedding_size", "word_embed_proj_dim", "emb_dim", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner",
                     "hidden_dim", "ffn_hidden_size", "dff", "block_ff_dim", "shared_expert_intermediate_size"),
                    FEED_FORWARD),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads",
                     "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
                     "encoder_num_attention_heads", "decoder_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads",
                     "decoder_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "kv_channels"), HEAD_WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
                     "num_encoder_layers", "num_decoder_layers", "depth", "encoder_num_hidden_layers",
                     "decoder_num_hidden_layers"), DEPTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_source_positions",
                     "max_target_positions", "seq_length"), 64),
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "image_size": 32, "patch_size": 8, "sliding_window": 16, "local_attention": 16,
    "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
}  # fmt: skip

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One family: what to build, and what it takes to run it."""

    name: str
    """transformers' `model_type`; "timm:NAME" for a timm model."""
    kind: str
    """decoder, moe, hybrid, encoder, seq2seq, vision, multimodal or speech."""
    auto: str
    """The Auto class whose head it has, or the class itself."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its config besides the common sizes; a nested config is a mapping."""
    batch: Callable[[Any], Batch] | None = None
    """config -> a batch of two rows, where kitout cannot make one up."""


def build(family: Family) -> nn.Module:
    """The model with seeded weights, in eval mode."""
    torch.manual_seed(0)
    if family.name.startswith("timm:"):
        from torchvision_stub import import_timm

        import_timm()
        import timm

        return randomize(timm.create_model(family.name[5:], **family.extras), family.name)
    config = CONFIG_MAPPING[family.name](**settings_of(CONFIG_MAPPING[family.name], family.extras))
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1  # generation asks for it
    cls = getattr(transformers, family.auto)
    model = cls.from_config(config, dtype=torch.float32) if family.auto.startswith("Auto") else cls(config)
    return randomize(model, family.name)


def settings_of(cls: Any, extras: Mapping[str, Any]) -> dict[str, Any]:
    """The common sizes that this config class has, its nested configs' as well, under the family's own settings."""
    defaults = cls()
    known = {**defaults.to_dict(), **dict.fromkeys(getattr(cls, "attribute_map", {}))}
    mapped = getattr(cls, "attribute_map", {})
    settings: dict[str, Any] = {}
    for name, value in COMMON.items():
        if name not in known or mapped.get(name, name) in settings or mapped.get(name) in COMMON:
            continue
        now = vars(defaults).get(mapped.get(name, name))
        if isinstance(now, (list, tuple)) or (now is None and name not in ("n_inner", "pad_token_id")):
            continue
        settings[name] = value
    for name in getattr(cls, "sub_configs", {}):
        nested = getattr(defaults, name, None)
        if name not in extras and hasattr(nested, "to_dict"):
            settings[name] = {**settings_of(type(nested), {}), "model_type": nested.model_type}
    layer_types = None if "layer_types" in mapped else vars(defaults).get("layer_types")
    if isinstance(layer_types, (list, tuple)) and len(layer_types) > DEPTH:
        kinds = list(dict.fromkeys(layer_types))
        settings["layer_types"] = (kinds * DEPTH)[: max(DEPTH, len(kinds))]
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in settings:
                settings[name] = len(settings["layer_types"])
    for name, value in extras.items():
        nested = getattr(defaults, name, None)
        if isinstance(value, Mapping) and hasattr(nested, "to_dict"):
            other = value.get("model_type", nested.model_type)
            inner = type(nested) if other == nested.model_type else CONFIG_MAPPING[other]
            settings[name] = {**settings_of(inner, value), "model_type": other}
        else:
            settings[name] = value
    return {name: value for name, value in settings.items() if value is not None or name in extras}


@torch.no_grad()
def randomize(model: nn.Module, name: str) -> nn.Module:
    """Matrices of unit gain where they were drawn small, vectors moved off their initial values; seeded by name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for _, value in sorted(model.named_parameters()):
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim < 2:
            value.add_(noise, alpha=0.1)
        elif value.std() < 0.1 or value.isnan().any():
            value.copy_(noise / (value[0].numel() if value.ndim == 4 else value.shape[-1]) ** 0.5)
    return model.float().eval()


def tokens(rows: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    """Ordinary ids, the end-of-sequence id last."""
    ids = torch.randint(5, VOCAB - 10, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 2
    return ids


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image_text(token_id: str, per_image: int, several: bool = False) -> Callable[[Any], Batch]:
    """One image per row: its tokens in front of the text. several: the model takes lists of images."""

    def batch(config: Any) -> Batch:
        image = torch.full((2, per_image), getattr(config, token_id))
        ids = torch.cat((image, tokens()), 1)
        pixels = noise(2, 1, 3, 32, 32) if several else noise(2, 3, 32, 32)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    return batch


def images(_config: Any) -> Batch:
    return {"pixel_values": noise(2, 3, 32, 32)}


def patches(config: Any) -> Batch:
    """Images as rows of patches, with the grid of each (qwen-vl): 4 x 4 patches, merged 2 x 2."""
    vision = config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
    ids = torch.cat((torch.full((2, 4), config.image_token_id), tokens()), 1)
    ids = torch.cat((torch.full((2, 1), config.vision_start_token_id), ids), 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(2 * 16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


def speech(name: str, *shape: int, decoder: bool = False) -> Callable[[Any], Batch]:
    def batch(_config: Any) -> Batch:
        return {name: noise(2, *shape)} | ({"decoder_input_ids": tokens()} if decoder else {})

    return batch


CAUSAL, SEQ, MODEL = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"
TO_TEXT, IMAGES, SPEECH = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModelForSpeechSeq2Seq"
VLM = "AutoModelForImageTextToText"
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
IDS = {"image_token_id": 98, "image_token_index": 98}
VL_IDS = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}


def _many(kind: str, auto: str, names: str) -> list[Family]:
    return [Family(name, kind, auto) for name in names.split()]


def _one(kind: str, auto: str, name: str, batch: Callable[[Any], Batch] | None = None, **extras: Any) -> Family:
    return Family(name, kind, auto, extras, batch)


FAMILIES: list[Family] = [
    *_many("decoder", CAUSAL, "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gpt_bigcode"
           " bloom stablelm starcoder2 olmo olmo2 olmo3 cohere cohere2 granite glm glm4 smollm3"
           " persimmon xglm biogpt ctrl openai-gpt arcee apertus helium diffllama exaone4 ernie4_5 seed_oss"
           " vaultgemma"),
    _one("decoder", CAUSAL, "gptj", rotary_dim=4),
    _one("decoder", CAUSAL, "codegen", rotary_dim=4),
    _one("decoder", CAUSAL, "nemotron", head_dim=8, num_key_value_heads=2),
    _one("decoder", CAUSAL, "minicpm3", num_key_value_heads=4),
    _one("decoder", CAUSAL, "opt", word_embed_proj_dim=32),
    _one("decoder", CAUSAL, "gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4, intermediate_size=48),
    _one("decoder", CAUSAL, "falcon", new_decoder_architecture=True),
    _one("decoder", CAUSAL, "mpt"),
    _one("decoder", CAUSAL, "gemma3n_text", num_kv_shared_layers=1,
         layer_types=["sliding_attention", "full_attention"] * 2,
         num_hidden_layers=4, laurel_rank=4, altup_num_inputs=2, intermediate_size=48,
         activation_sparsity_pattern=[0.0] * 4),
    _one("decoder", CAUSAL, "gemma4_text", num_kv_shared_layers=0),
    _one("decoder", CAUSAL, "modernbert-decoder"),
    *_many("moe", CAUSAL, "mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe gpt_oss glm4_moe jetmoe"
           " llama4_text ernie4_5_moe"),
    _one("moe", CAUSAL, "deepseek_v2", num_key_value_heads=4, head_dim=8, num_experts_per_tok=2),
    _one("moe", CAUSAL, "deepseek_v3", num_key_value_heads=4, head_dim=8, first_k_dense_replace=1),
    *_many("hybrid", CAUSAL, "lfm2 mamba"),
    _one("hybrid", CAUSAL, "jamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    _one("hybrid", CAUSAL, "bamba", attn_layer_indices=[1], **SSM),
    _one("hybrid", CAUSAL, "falcon_h1", mamba_d_ssm=64, **SSM),
    _one("hybrid", CAUSAL, "granitemoehybrid", layer_types=["mamba", "attention"], **SSM),
    _one("hybrid", CAUSAL, "nemotron_h", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1,
         chunk_size=8),
    _one("hybrid", CAUSAL, "mamba2", num_heads=8, state_size=8, n_groups=1, chunk_size=8),
    _one("hybrid", CAUSAL, "qwen3_next", linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
         linear_value_head_dim=8),
    _one("hybrid", CAUSAL, "recurrent_gemma", num_hidden_layers=3),
    *_many("encoder", SEQ, "bert roberta albert distilbert electra deberta deberta-v2 mpnet camembert"
           " xlm-roberta convbert squeezebert ernie rembert roformer megatron-bert data2vec-text"
           " nystromformer fnet ibert"),
    _one("encoder", SEQ, "funnel", block_sizes=[1, 1], num_decoder_layers=1, d_inner=48),
    _one("encoder", SEQ, "mobilebert", intra_bottleneck_size=32, true_hidden_size=32, num_feedforward_networks=2),
    _one("encoder", SEQ, "modernbert", local_attention=64),
    _one("encoder", SEQ, "longformer", attention_window=[4, 4]),
    _one("encoder", SEQ, "big_bird", attention_type="original_full"),
    _one("encoder", SEQ, "xlnet", d_inner=48),
    _one("encoder", SEQ, "layoutlm"),
    _one("encoder", SEQ, "esm", vocab_size=VOCAB, mask_token_id=3, pad_token_id=0),
    *_many("seq2seq", TO_TEXT, "t5 mt5 umt5 bart mbart pegasus m2m_100 marian blenderbot longt5 switch_transformers"
           " nllb-moe prophetnet plbart t5gemma"),
    _one("seq2seq", TO_TEXT, "led", attention_window=[4, 4]),
    *_many("vision", IMAGES, "vit beit dinov2 dinov2_with_registers data2vec-vision vit_msn"),
    _one("vision", "DeiTForImageClassification", "deit"),
    _one("vision", IMAGES, "pvt", hidden_sizes=[16, 32], depths=[1, 1], num_attention_heads=[1, 2],
         num_encoder_blocks=2, sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2]),
    _one("vision", IMAGES, "segformer", images, hidden_sizes=[16, 32],
         depths=[1, 1], num_attention_heads=[1, 2], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3],
         strides=[4, 2], mlp_ratios=[2, 2]),
    *_many("vision", MODEL, "dinov3_vit siglip_vision_model clip_vision_model ijepa"),
    _one("vision", IMAGES, "swin", embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4),
    _one("vision", IMAGES, "swinv2", embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4),
    _one("vision", MODEL, "sam_vision_model", mlp_dim=48, output_channels=16, window_size=2, global_attn_indexes=[1]),
    _one("multimodal", MODEL, "clip"),
    _one("multimodal", MODEL, "siglip"),
    _one("multimodal", MODEL, "blip"),
    _one("multimodal", VLM, "llava", image_text("image_token_id", 16), **IDS, vision_feature_layer=-1,
         vision_config={"model_type": "clip_vision_model"}, text_config={"model_type": "llama"}),
    _one("multimodal", VLM, "paligemma", image_text("image_token_id", 16), **IDS, projection_dim=32),
    _one("multimodal", VLM, "gemma3", image_text("image_token_id", 4), **IDS, mm_tokens_per_image=4),
    _one("multimodal", VLM, "qwen2_vl", patches, **VL_IDS, text_config=MROPE),
    _one("multimodal", VLM, "qwen2_5_vl", patches, **VL_IDS, text_config=MROPE,
         vision_config={"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}),
    _one("multimodal", VLM, "qwen3_vl", patches, **VL_IDS, text_config=MROPE,
         vision_config={"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    _one("multimodal", VLM, "blip-2", image_text("image_token_id", 4), **IDS, num_query_tokens=4),
    _one("multimodal", VLM, "idefics3", image_text("image_token_id", 4, several=True), **IDS, scale_factor=2),
    _one("multimodal", VLM, "internvl", image_text("image_token_id", 4), **IDS,
         vision_config={"image_size": [32, 32], "patch_size": [8, 8]}),
    _one("speech", SPEECH, "whisper", speech("input_features", 16, 128, decoder=True), num_mel_bins=16),
    *(
        _one("speech", "AutoModelForCTC", name, speech("input_values", 800), conv_dim=[16, 16], conv_stride=[5, 4],
             conv_kernel=[10, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
        for name in ("wav2vec2", "hubert", "wavlm", "unispeech")
    ),
    _one("speech", SPEECH, "speech_to_text", speech("input_features", 64, 16, decoder=True), input_feat_per_channel=16),
    _one("speech", "AutoModelForAudioClassification", "audio-spectrogram-transformer", speech("input_values", 32, 16),
         max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8),
    *(
        _one("vision", "", f"timm:{name}", embed_dim=32, depth=2, num_heads=4, img_size=32, patch_size=8)
        for name in ("vit_base_patch16_224", "beit_base_patch16_224", "deit_base_patch16_224", "eva02_base_patch14_224")
    ),
    _one("vision", "", "timm:swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=32,
         window_size=4),
]  # fmt: skip
