"""The zoo: tiny random models, built offline and seeded, on which every law is tested.

Nothing in them is at its initial value: biases, norm gains and shifts, LayerScale, relative position tables and class
tokens are all random, and matrices are scaled so that attention is far from uniform. A merge that forgets a bias, or
mistakes the convention of a gain, changes the logits here. Widths differ on purpose (hidden, feed-forward, head,
tokens), so that a wrong axis raises. KITOUT_TEST_DEVICE=cuda puts models and inputs there, for the laws;
"emulated" is a second device without hardware (emulated_device.py). The zoo knows transformers and timm, and nothing of
kitout.
"""

from __future__ import annotations

import os
import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
import torch
import transformers
from torch import Tensor, nn

from torchvision_stub import import_timm

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision"]
Positions = Literal["rotary", "learned", "relative"]

VOCAB, LABELS, IMAGE = 99, 5, 32
DEVICE = os.environ.get("KITOUT_TEST_DEVICE", "cpu")
LENGTH, TARGET_LENGTH = 7, 5  # tokens per row, and decoder tokens per row of an encoder-decoder
D, FF, HEADS = 48, 80, 4
FIRST_TOKEN = 5  # smaller ids are pad, bos, eos and the like: never drawn, RoBERTa counts positions by them


@dataclass(frozen=True)
class Specimen:
    """One tiny model: how to build it, its inputs, and the facts that the laws rely on."""

    name: str
    """Its name in the zoo."""
    build: Callable[[], nn.Module]
    """Builds it, with the same weights each time."""
    batch: Callable[[int, int], dict[str, Tensor]]
    """(rows, seed) -> inputs. Rows have one shape: they can be split, stacked and reordered along dim 0."""
    kind: Kind
    """What it reads and writes."""
    generates: bool
    """It has `generate`. Its eos may be sampled: pass min_new_tokens."""
    positions: Positions
    """How it encodes positions."""
    layers: int
    """Number of blocks over all towers."""
    width: int = D
    """Hidden size of the first tower."""
    pad_id: int = 0
    """Id of the padding token."""
    tied: bool = False
    """The output head is the token embedding."""
    counts_mask: bool = False
    """Learned positions are counted from the attention mask."""

    @property
    def is_text(self) -> bool:
        """It reads tokens, not images."""
        return self.kind != "vision"

    @property
    def left_pads(self) -> bool:
        """Left padding, without position ids, does not change the logits of real tokens.

        It does where learned positions count from the left edge, and where an encoder's classifier reads token 0.
        """
        return self.kind in ("decoder", "encoder-decoder") and (self.positions != "learned" or self.counts_mask)


def out(output: Any) -> Tensor:
    """The tensor a test compares: logits where there are any, else the last hidden state, else the first entry."""
    if isinstance(output, Tensor):
        return output
    for field in ("logits", "last_hidden_state"):
        if getattr(output, field, None) is not None:
            return getattr(output, field)
    return output[0]


# --- inputs ----------------------------------------------------------------------------------------------------------


def _tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(FIRST_TOKEN, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def text_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    ids = _tokens(rows, LENGTH, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seq2seq_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return text_batch(rows, seed) | {"decoder_input_ids": _tokens(rows, TARGET_LENGTH, seed + 10_000)}


def image_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels.to(DEVICE)}


def timm_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": image_batch(rows, seed)["pixel_values"]}


def rows_of(batch: Mapping[str, Tensor], *rows: int) -> dict[str, Tensor]:
    """These rows of a batch, in this order."""
    return {name: value[list(rows)] for name, value in batch.items()}


def padded(
    batch: Mapping[str, Tensor], lengths: list[int], side: Literal["left", "right"], pad_id: int = 0
) -> dict[str, Tensor]:
    """The text batch with row i cut to its first lengths[i] tokens and padded again on one side (encoder inputs only).

    The real tokens keep their order, so they are `ids[i][mask[i].bool()]` whichever side is padded.
    """
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    padded_ids, mask = torch.full_like(ids, pad_id), torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        real = slice(length - n, length) if side == "left" else slice(0, n)
        padded_ids[row, real], mask[row, real] = ids[row, :n], 1
    return dict(batch) | {"input_ids": padded_ids, "attention_mask": mask}


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_of(specimen: Specimen) -> transformers.PreTrainedTokenizerFast:
    """One token per ASCII character, in the specimen's 99 ids: a real tokenizer for tests that start from text."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if specimen.pad_id == 1:
        special[:2] = special[1::-1]
    characters = string.printable[:94] + " \n"  # all of ASCII but tabs and the like; "~" makes room for the newline
    vocabulary = {token: i for i, token in enumerate([*special, *characters.replace("~", "")])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **names)


# --- models ----------------------------------------------------------------------------------------------------------


def randomize_model(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter at random: vectors around their initial value, matrices of unit gain; fp32, eval mode, seeded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            if value.ndim < 2:  # bias, gain, shift, LayerScale
                value.add_(noise, alpha=0.2)
            else:  # convolutions read all but their first axis, everything else its last
                fan = value[0].numel() if value.ndim == 4 else value.shape[-1]
                value.copy_(noise / fan**0.5)
    return model.float().eval()


def _make(name: str, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The builder of a specimen: same weights each time, global random state unchanged."""
    seed = zlib.crc32(name.encode())

    def build_seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = randomize_model(build(), seed)
            return model if DEVICE == "cpu" else model.to(DEVICE)  # a test may have built it on meta

    return build_seeded


def _hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """transformers.<model>(<config>(**settings)) without any dropout, so that train() stays deterministic."""

    def build() -> nn.Module:
        hf_config = getattr(transformers, config)(**settings)
        for key, value in hf_config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(hf_config, key, 0.0)
        return getattr(transformers, model)(hf_config)

    return build


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # RoBERTa's and BART's
_TEXT = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": FF, "num_attention_heads": HEADS}
_DECODER = {**_TEXT, **_IDS, "num_hidden_layers": 2, "max_position_embeddings": 64}
_GQA = {**_DECODER, "num_key_value_heads": 2}
_GEMMA_N = {
    **_GQA,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_GPT = {"vocab_size": VOCAB, "n_embd": D, "n_inner": FF, "n_head": HEADS, "n_layer": 2, "n_positions": 64, **_IDS}
_ENCODER = {**_TEXT, "num_hidden_layers": 3, "max_position_embeddings": 64, "num_labels": LABELS}
_VISION = {"image_size": IMAGE, "num_labels": LABELS}
_VIT = {**_VISION, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": HEADS, "patch_size": 8}


def _timm_vit() -> nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": IMAGE, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": HEADS, "mlp_ratio": FF / D}
    return VisionTransformer(**sizes, num_classes=LABELS, init_values=1.0)  # init_values: with LayerScale


def _decoder(name: str, build: Callable[[], nn.Module], **facts: Any) -> Specimen:
    facts = {"positions": "rotary", "layers": 2, "generates": True} | facts
    return Specimen(name, _make(name, build), text_batch, kind="decoder", **facts)


def _encoder(name: str, build: Callable[[], nn.Module], **facts: Any) -> Specimen:
    facts = {"positions": "learned", "layers": 3, "generates": False} | facts
    return Specimen(name, _make(name, build), text_batch, kind="encoder", **facts)


def _seq2seq(name: str, build: Callable[[], nn.Module], **facts: Any) -> Specimen:
    facts = {"layers": 5, "generates": True, "tied": True} | facts
    return Specimen(name, _make(name, build), seq2seq_batch, kind="encoder-decoder", **facts)


def _vision(name: str, build: Callable[[], nn.Module], **facts: Any) -> Specimen:
    facts = {"positions": "learned", "layers": 3, "generates": False, "batch": image_batch} | facts
    return Specimen(name, _make(name, build), kind="vision", **facts)


_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
_JAMBA |= {"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 6}

ZOO: dict[str, Specimen] = {
    s.name: s
    for s in (
        _decoder("llama", _hf("LlamaForCausalLM", "LlamaConfig", **_GQA)),
        _decoder("llama-tied", _hf("LlamaForCausalLM", "LlamaConfig", **_GQA, tie_word_embeddings=True), tied=True),
        _decoder("qwen3", _hf("Qwen3ForCausalLM", "Qwen3Config", **_GQA, head_dim=16)),  # 4 heads of 16: 64, not 48
        _decoder("gpt2", _hf("GPT2LMHeadModel", "GPT2Config", **_GPT), positions="learned", tied=True),
        _decoder(
            "gpt-neox",
            _hf(
                "GPTNeoXForCausalLM",
                "GPTNeoXConfig",
                **_DECODER,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            ),
        ),
        _encoder("bert", _hf("BertForSequenceClassification", "BertConfig", **_ENCODER)),
        _encoder(
            "roberta", _hf("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER, **_BERT_IDS), pad_id=1
        ),
        _seq2seq(
            "t5",
            _hf(
                "T5ForConditionalGeneration",
                "T5Config",
                vocab_size=VOCAB,
                d_model=D,
                d_kv=16,  # 4 heads of 16: 64, not 48
                d_ff=FF,
                num_layers=2,  # as many in the decoder: transformers 5.23 sizes the cache by the encoder's number
                num_heads=HEADS,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=20,
                decoder_start_token_id=0,
            ),
            positions="relative",
            layers=4,
        ),
        _seq2seq(
            "bart",
            _hf(
                "BartForConditionalGeneration",
                "BartConfig",
                vocab_size=VOCAB,
                d_model=D,
                encoder_layers=2,
                decoder_layers=3,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_ffn_dim=FF,
                decoder_ffn_dim=FF,
                max_position_embeddings=64,
                forced_eos_token_id=None,
                **_BERT_IDS,
            ),
            positions="learned",
            pad_id=1,
        ),
        _vision("vit", _hf("ViTForImageClassification", "ViTConfig", **_VIT, intermediate_size=FF)),
        _vision("dinov2", _hf("Dinov2ForImageClassification", "Dinov2Config", **_VIT, mlp_ratio=2)),
        _vision(
            "swin",
            _hf(
                "SwinForImageClassification",
                "SwinConfig",
                **_VISION,
                patch_size=4,  # 8 x 8 patches: 4 windows of 4 x 4, shifted in the second block; then 4 x 4 patches
                embed_dim=24,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                mlp_ratio=2.0,
            ),
            positions="relative",
            layers=4,
            width=24,
        ),
        _vision("timm-vit", _timm_vit, batch=timm_batch),
    )
}

# Models that only some tests need: fused layouts, unusual norms, shared blocks, experts.
EXTRA: dict[str, Specimen] = {
    s.name: s
    for s in (
        _decoder(
            "falcon",  # grouped fused qkv, parallel attention and feed-forward with two norms
            _hf(
                "FalconForCausalLM",
                "FalconConfig",
                vocab_size=VOCAB,
                hidden_size=D,
                ffn_hidden_size=FF,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                num_kv_heads=2,
                new_decoder_architecture=True,
                bias=True,
                max_position_embeddings=64,
                **_IDS,
            ),
            tied=True,
        ),
        _decoder("phi3", _hf("Phi3ForCausalLM", "Phi3Config", **_GQA)),  # fused qkv and fused gate_up
        _encoder(
            "modernbert",  # fused qkv and fused gate, rotary, local and global layers
            _hf(
                "ModernBertForSequenceClassification",
                "ModernBertConfig",
                **_ENCODER,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
                local_attention=6,
                layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            ),
            positions="rotary",
        ),
        _decoder(
            "gemma2",  # norms before and after each sublayer, gain 1 + w, logits capped
            _hf("Gemma2ForCausalLM", "Gemma2Config", **_GQA, head_dim=16, query_pre_attn_scalar=16, sliding_window=64),
            tied=True,
        ),
        _decoder(
            "gemma3",  # a token table that multiplies what it looks up
            _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **_GQA, head_dim=16, sliding_window=64),
            tied=True,
        ),
        _decoder(
            "gemma3n",  # the last two layers attend to the keys of others; a second table of token ids
            _hf(
                "Gemma3nForCausalLM",
                "Gemma3nTextConfig",
                **_GEMMA_N,
                laurel_rank=4,
                altup_num_inputs=2,
                activation_sparsity_pattern=[0.0] * 4,
            ),
            layers=4,
            tied=True,
        ),
        _decoder(
            "gemma4",
            _hf("Gemma4ForCausalLM", "Gemma4TextConfig", **_GEMMA_N, global_head_dim=16),
            layers=4,
            tied=True,
        ),
        _decoder(
            "falcon-mq",  # one head of keys for all queries
            _hf(
                "FalconForCausalLM",
                "FalconConfig",
                vocab_size=VOCAB,
                hidden_size=D,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                multi_query=True,
                new_decoder_architecture=False,
                **_IDS,
            ),
            tied=True,
        ),
        _decoder("olmo2", _hf("Olmo2ForCausalLM", "Olmo2Config", **_GQA)),  # norms after each sublayer only, q/k norms
        _encoder(
            "albert",  # one block used three times
            _hf("AlbertForSequenceClassification", "AlbertConfig", **_ENCODER, embedding_size=24),
            layers=1,
        ),
        _decoder(
            "mixtral",  # experts: 3-D parameters
            _hf("MixtralForCausalLM", "MixtralConfig", **_GQA, num_local_experts=4, num_experts_per_tok=2),
        ),
        _decoder(
            "mpt",  # ALiBi, norms without shift, fused Wqkv
            _hf(
                "MptForCausalLM",
                "MptConfig",
                vocab_size=VOCAB,
                d_model=D,
                n_heads=HEADS,
                n_layers=2,
                expansion_ratio=2,
                max_seq_len=64,
                **_IDS,
            ),
            positions="relative",
            tied=True,
        ),
        _decoder(
            "opt",  # learned positions with an offset, counted from the mask
            _hf(
                "OPTForCausalLM",
                "OPTConfig",
                vocab_size=VOCAB,
                hidden_size=D,
                word_embed_proj_dim=D,
                ffn_dim=FF,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                max_position_embeddings=64,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=2,
            ),
            positions="learned",
            counts_mask=True,
            pad_id=1,
            tied=True,
        ),
        _encoder(
            "distilbert",
            _hf(
                "DistilBertForSequenceClassification",
                "DistilBertConfig",
                vocab_size=VOCAB,
                dim=D,
                hidden_dim=FF,
                n_heads=HEADS,
                n_layers=3,
                max_position_embeddings=64,
                num_labels=LABELS,
            ),
        ),
        _vision(
            "siglip",  # pools by torch's own attention, which multiplies by its parameters
            _hf("SiglipVisionModel", "SiglipVisionConfig", **_VIT, intermediate_size=FF),
        ),
        _seq2seq(
            "switch",  # experts as a list of modules, of which a few tokens choose a few
            _hf(
                "SwitchTransformersForConditionalGeneration",
                "SwitchTransformersConfig",
                vocab_size=VOCAB,
                d_model=D,
                d_kv=16,
                d_ff=FF,
                num_layers=2,
                num_decoder_layers=2,
                router_jitter_noise=0.0,
                num_heads=HEADS,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
                num_experts=6,
                decoder_start_token_id=0,
            ),
            positions="relative",
            layers=4,
        ),
        _decoder(
            "jamba",  # state-space layers, whose scan reads the weights of a linear and of a convolution
            _hf("JambaForCausalLM", "JambaConfig", **_GQA, **_JAMBA),
        ),
        _decoder("gptj", _hf("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=6)),  # parallel residual, no qkv bias
    )
}
