"""Tiny translation models whose tokenizers write language codes: in front of a target (NLLB), or behind it (mBART)."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MBartTokenizer, NllbTokenizer

PIECES = ["▁", *string.ascii_lowercase]
SIZES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def nllb_tokenizer() -> Any:
    names = ["<s>", "<pad>", "</s>", "<unk>", *PIECES]
    return NllbTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])


def mbart_tokenizer() -> Any:
    names = ["<s>", "<pad>", "</s>", "<unk>", *PIECES]
    return MBartTokenizer(vocab=[(name, -float(i > 3)) for i, name in enumerate(names)])


def nllb(folder: Path) -> Path:
    return _saved(transformers.M2M100ForConditionalGeneration, transformers.M2M100Config, nllb_tokenizer(), folder)


def mbart(folder: Path) -> Path:
    return _saved(transformers.MBartForConditionalGeneration, transformers.MBartConfig, mbart_tokenizer(), folder)


def _saved(model_class: Any, config_class: Any, tokenizer: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model_class(config_class(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
