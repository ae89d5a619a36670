"""Published parameter counts, on the real shapes: closed form, tensors and paper agree.

The models are built on the meta device, where the probe runs too, so that BERT-large costs as much as BERT-tiny.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as tf

import kitout
from kitout import (
    IA3,
    SSF,
    VPT,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    Houlsby,
    LoRA,
    Method,
    ParallelAdapter,
    PartialFineTuning,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
T5_XL = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24, "num_decoder_layers": 24}
SHAPES = {
    "bert-base": lambda: tf.BertModel(tf.BertConfig()),
    "bert-base-classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig()),
    "bert-large": lambda: tf.BertModel(tf.BertConfig(**LARGE)),
    "roberta-base": lambda: tf.RobertaModel(tf.RobertaConfig()),
    "vit-b16": lambda: tf.ViTForImageClassification(tf.ViTConfig(num_labels=100)),
    "t5-v1.1-xl": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5_XL, feed_forward_proj="gated-gelu", vocab_size=32128, tie_word_embeddings=False)
    ),
}


@cache
def kit_of(shape: str) -> kitout.Kit:
    with torch.device("meta"):
        return kitout.attach(SHAPES[shape]().eval())


B = 12 * 768**2 + 13 * 768  # one block of the base shapes

PUBLISHED: list[tuple[str, Method, int]] = [
    ("vit-b16", LoRA(rank=8), 294_912),
    ("roberta-base", LoRA(rank=8), 294_912),
    ("bert-base", LoRA(rank=8, dora=True), 313_344),
    ("bert-base", IA3(), 55_296),
    ("t5-v1.1-xl", IA3(), 540_672),
    ("bert-base", BitFit(), 102_912),
    ("bert-base-classifier", BitFit(), 102_912),  # the classifier's own bias is not the method's
    ("vit-b16", SSF(), 205_824),
    ("vit-b16", AdaptFormer(), 1_189_632),
    ("vit-b16", AdaptFormer(scale="learned"), 1_189_632 + 12),
    ("vit-b16", AdaptFormer(width=8), 156_768),
    ("bert-base", Houlsby(width=48, norms=False), 1_789_056),
    ("bert-base", Houlsby(width=48), 1_789_056 + 25 * 2 * 768),  # two norms a block and the embeddings'
    ("bert-large", Houlsby(width=64, norms=False), 6_343_680),
    ("bert-base", Pfeiffer(width=48), 894_528),
    ("bert-base", ParallelAdapter(width=384), 7_091_712),
    ("vit-b16", PartialFineTuning(last=1), 7_087_872 + 1_536),
    ("vit-b16", PartialFineTuning(last=4), 4 * 7_087_872 + 1_536),
    ("bert-base", PartialFineTuning(last=2), 2 * 7_087_872),
    ("vit-b16", PartialFineTuning(part="head"), 76_900),
    ("vit-b16", PartialFineTuning(part="norms"), 25 * 2 * 768),
    ("vit-b16", FullFineTuning(), 12 * B + 1_536 + 76_900 + 768 + 197 * 768 + 768 * 768 + 768),
    ("bert-base", FullFineTuning(), 109_482_240),
    ("vit-b16", VPT(length=50, deep=True), 460_800),
    ("vit-b16", VPT(length=50), 38_400),
    ("vit-b16", VPT(length=50, deep=True, share=True), 38_400),
    ("vit-b16", VPT(length=50, deep=True, layers="last:4"), 4 * 38_400),
    ("vit-b16", VPT(length=50, deep=True, projection=64), 12 * 50 * 64 + 65 * 768),
    ("vit-b16", VPT(length=50, deep=True, share=True, projection=64), 50 * 64 + 65 * 768),
]


@pytest.mark.parametrize(
    ("shape", "method", "published"), PUBLISHED, ids=[f"{s}-{type(m).__name__}-{n}" for s, m, n in PUBLISHED]
)
def test_published_counts(shape: str, method: Method, published: int) -> None:
    kit = kit_of(shape)
    assert method.num_parameters(method.sites(kit.survey)) == published
    kit.add("a", method, seed=0)
    try:
        count = kit.num_parameters("a")  # compares the closed form with the tensors
        assert (count.formula, count.trainable, count.total) == (published,) * 3
    finally:
        kit.remove("a")


SLIM = {  # the published widths and depths on CPU: transformers' masks for text read values, which meta tensors lack
    "bert-base": lambda: tf.BertModel(tf.BertConfig(vocab_size=99, intermediate_size=8)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=99, n_inner=8)),
    "t5-xl, one block": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=99, d_model=2048, d_ff=8, num_layers=1, num_heads=2)
    ),
}

IN_FRONT: dict[str, list[tuple[Method, int]]] = {
    "bert-base": [
        (PrefixTuning(length=30), 552_960),
        (PrefixTuning(length=30, encoder=512), 9_872_384),
        (PromptTuning(length=20), 15_360),
    ],
    "gpt2": [
        (PrefixTuning(length=10), 184_320),
        (PrefixTuning(length=10, encoder=512), 9_857_024),
    ],
    "t5-xl, one block": [
        (PromptTuning(length=100), 204_800),
        (PromptTuning(length=100, stacks="both"), 2 * 204_800),
        (PrefixTuning(length=100), 3 * 2 * 100 * 128),  # encoder, decoder and cross
    ],
}


@pytest.mark.parametrize("shape", SLIM)
def test_published_counts_of_virtual_tokens(shape: str) -> None:
    kit = kitout.attach(SLIM[shape]().eval())
    for i, (method, published) in enumerate(IN_FRONT[shape]):
        assert method.num_parameters(method.sites(kit.survey)) == published
        kit.add(f"a{i}", method, seed=0)
        count = kit.num_parameters(f"a{i}")
        assert (count.formula, count.trainable, count.total) == (published,) * 3


def test_a_head_counts_beside_the_method() -> None:
    """The 1.26 million of AdaptFormer's table 1 include a classifier of 100 classes."""
    kit = kit_of("vit-b16")
    kit.add("a", AdaptFormer(), heads={"classifier": torch.nn.Linear(768, 100)})
    assert (kit.num_parameters("a").total, kit.num_parameters("a").heads) == (1_266_532, 76_900)
    kit.remove("a")
