"""Tiny models in folders, as a user has them: weights, tokenizer, chat template or image processor, built offline.

One word of a text decides its label, so that a tiny model can learn something in seconds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
GOOD, BAD = ["love", "great", "sunny", "happy"], ["hate", "awful", "rainy", "sad"]
WORDS = ["the", "cat", "dog", "house", "tree", "walk", "today", "again"]


def reviews(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts whose label one word decides."""
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        is_good = i % 2 == 0
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if is_good else BAD))
        rows.append({"text": " ".join([*words, str(i)]), "label": "good" if is_good else "bad"})
    return rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    corpus = [" ".join(row.values()) for row in reviews(50)] + ["system user assistant 0123456789 good bad"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(corpus, trainer)
    raw.decoder = decoders.ByteLevel()
    if not template:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>",
        bos_token="<s>", eos_token="<|im_end|>" if template else "</s>",
    )  # fmt: skip
    if template:
        fast.chat_template = CHATML
    return fast


def decoder(folder: Path) -> Path:
    fast = tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=5, pad_token_id=0, bos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _saved(transformers.LlamaForCausalLM(config), fast, folder)


def encoder(folder: Path) -> Path:
    fast = tokenizer(template=False)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(fast), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return _saved(transformers.BertModel(config), fast, folder)


def both(folder: Path) -> Path:
    fast = tokenizer(template=False)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(fast), d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _saved(transformers.T5ForConditionalGeneration(config), fast, folder)


def vision(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 32, "width": 32},
                "do_resize": True,
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        ),
        encoding="utf-8",
    )
    return folder


def _saved(model: Any, fast: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
