"""Models that read sound or images and write text: PEFT loads our folder, computes the same and generates the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import kitout
from kitout import LoRA
from zoo import out

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

IDS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZES = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        **IDS, **SIZES, **HEADS, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def speech_to_text() -> nn.Module:
    config = transformers.Speech2TextConfig(
        **IDS, **SIZES, **HEADS, input_feat_per_channel=8, max_source_positions=40, max_target_positions=32,
        conv_channels=16,
    )  # fmt: skip
    return transformers.Speech2TextForConditionalGeneration(config)


def moonshine() -> nn.Module:
    config = transformers.MoonshineConfig(
        **IDS, hidden_size=48, intermediate_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4,
    )  # fmt: skip
    return transformers.MoonshineForConditionalGeneration(config)


def images_to_text() -> nn.Module:
    encoder = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    decoder = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=32, **IDS)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config=config)


INPUTS: dict[Callable[[], nn.Module], dict[str, tuple[int, ...]]] = {
    whisper: {"input_features": (2, 8, 40)},
    speech_to_text: {"input_features": (2, 40, 8)},
    moonshine: {"input_values": (2, 4000)},
    images_to_text: {"pixel_values": (2, 3, 16, 16)},
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    model, draw = build(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    return model.float().eval()


@pytest.mark.parametrize("build", INPUTS, ids=lambda build: build.__name__)
def test_peft_runs_what_is_saved(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs: dict[str, Tensor] = {name: torch.randn(shape, generator=draw) for name, shape in INPUTS[build].items()}
    batch = inputs | {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    kit = kitout.attach(seeded(build), example_batch=batch)
    with torch.no_grad():
        off = out(kit(**batch))
    kit.add("a", LoRA(rank=2, targets="attn.q attn.v"))
    with torch.no_grad():
        for p in kit["a"].parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    kit.eval()
    kit.use("a")
    kitout.save_peft(kit, "a", tmp_path)
    model = peft.PeftModel.from_pretrained(seeded(build), tmp_path).eval()
    with torch.no_grad():
        here, there = out(kit(**batch)), out(model(**batch))
    assert (here - off).abs().max() > 1e-2
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(kit.generate(**inputs, **how), model.generate(**inputs, **how))
