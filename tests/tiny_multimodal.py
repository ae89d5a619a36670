"""Tiny models of text and images or sounds, with batches whose rows hold any number of them, of any size.

One of each way in which a tower meets its images: one after the other, packed by patches, padded by row, before a
generate of its own. It knows transformers, and nothing of kitout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

from zoo import randomize_model

MEDIUM, START, END = 90, 92, 93  # ids that stand for a piece of a picture or sound, and its bounds
Batch = dict[str, Tensor]

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_TOWER, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Multimodal:
    """One tiny model: how to build it, and its inputs."""

    name: str
    """Its name."""
    build: Callable[[], nn.Module]
    """Builds it, with the same weights each time."""
    batch: Callable[[Sequence[int]], Batch]
    """Number of images in each row -> inputs."""
    row: Callable[[Batch, Sequence[int], int], Batch]
    """The inputs of one row of a batch, with its images."""
    text_part: str
    """Path of what sees the text alone."""


def text_of(counts: Sequence[int], pieces: int) -> Batch:
    """Texts, padded at the left, with so many pieces for each of a row's images."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for count in counts:
        words = torch.randint(5, 80, (count + 5,), generator=draw).tolist()
        rows.append(words[:3] + [i for word in words[5:] for i in (START, *[MEDIUM] * pieces, END, word)] + words[3:5])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _row_of_list(batch: Batch, counts: Sequence[int], row: int) -> Batch:
    """Where images come one after the other."""
    start = sum(counts[:row])
    own = {k: v[row : row + 1] if k in TEXT else v[start : start + counts[row]] for k, v in batch.items()}
    return {k: v for k, v in own.items() if len(v)}


def _row_of_packed(batch: Batch, counts: Sequence[int], row: int) -> Batch:
    """Where the patches of all images are in one list."""
    start = sum(counts[:row])
    patches = batch["image_grid_thw"].prod(1)
    first, length = int(patches[:start].sum()), int(patches[start : start + counts[row]].sum())
    rest = _row_of_list({k: v for k, v in batch.items() if k != "pixel_values"}, counts, row)
    return rest | ({"pixel_values": batch["pixel_values"][first : first + length]} if length else {})


def _row_of_padded(batch: Batch, counts: Sequence[int], row: int) -> Batch:
    """Where every row has room for as many images as the fullest."""
    return {k: v[row : row + 1] for k, v in batch.items() if k in TEXT or counts[row]}


TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


def _llava() -> nn.Module:
    vision, text = hf.CLIPVisionConfig(**_VISION), hf.LlamaConfig(**_TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=MEDIUM, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    ids = {"image_token_id": MEDIUM, "video_token_id": 91, "vision_start_token_id": START, "vision_end_token_id": END}
    config = hf.Qwen2VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **ids)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_vl_batch(counts: Sequence[int], grids: Sequence[tuple[int, int, int]] | None = None) -> Batch:
    """grids: patches of each image in time, height and width; four of them make a piece."""
    grids = grids or [(1, 4, 4)] * sum(counts)
    text = text_of(counts, 4)
    text["mm_token_type_ids"] = (text["input_ids"] == MEDIUM).int()
    return text | {
        "pixel_values": _noise(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor(grids),
    }


def _idefics2() -> nn.Module:
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = hf.Idefics2Config(
        text_config=hf.MistralConfig(**_TEXT),
        vision_config=_VISION,
        perceiver_config={**perceiver, "num_key_value_heads": 2, "hidden_size": 32},
        image_token_id=MEDIUM,
    )
    return hf.Idefics2ForConditionalGeneration(config)


def _idefics2_batch(counts: Sequence[int]) -> Batch:
    pixels = _noise(len(counts), max(counts), 3, 16, 16)
    for row, count in zip(pixels, counts, strict=True):
        row[count:] = 0
    return {**text_of(counts, 4), "pixel_values": pixels}


def _blip2() -> nn.Module:
    text = hf.OPTConfig(
        vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    former = {**_TOWER, "vocab_size": 99, "encoder_hidden_size": 32}
    config = hf.Blip2Config(
        vision_config=_VISION, qformer_config=former, text_config=text, num_query_tokens=4, image_token_index=MEDIUM
    )
    return hf.Blip2ForConditionalGeneration(config)


def _qwen2_audio() -> nn.Module:
    audio = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 16,
    }  # fmt: skip
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=hf.Qwen2Config(**_TEXT), audio_token_index=MEDIUM)
    return hf.Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_batch(counts: Sequence[int]) -> Batch:
    mask = torch.ones(sum(counts), 32, dtype=torch.long)
    return {**text_of(counts, 8), "input_features": _noise(sum(counts), 8, 32), "feature_attention_mask": mask}


def _pictures(counts: Sequence[int]) -> Batch:
    return {**text_of(counts, 4), "pixel_values": _noise(sum(counts), 3, 16, 16)}


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return randomize_model(build(), 0)

    return seeded


MULTIMODAL = {
    m.name: m
    for m in (
        Multimodal("llava", _seeded(_llava), _pictures, _row_of_list, "model.language_model"),
        Multimodal("qwen2-vl", _seeded(_qwen2_vl), qwen2_vl_batch, _row_of_packed, "model.language_model"),
        Multimodal("idefics2", _seeded(_idefics2), _idefics2_batch, _row_of_padded, "model.text_model"),
        Multimodal("blip-2", _seeded(_blip2), _pictures, _row_of_list, "language_model"),
        Multimodal("qwen2-audio", _seeded(_qwen2_audio), _qwen2_audio_batch, _row_of_list, "model.language_model"),
    )
}
