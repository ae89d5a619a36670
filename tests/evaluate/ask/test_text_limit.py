"""The limit of a text's length, of many families: a text of that many tokens runs, and one with one more does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kitout
from kitout import IA3, Kit, PrefixTuning, PromptTuning
from kitout.base import token_limit
from kitout.errors import KitoutError, RouteError
from kitout.evaluate.ask.text_limit import max_tokens

POSITIONS, WANTED, FRONT = 16, 40, 3
TEXT = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
TEXT |= {"max_position_embeddings": POSITIONS}
GPT = {"vocab_size": 99, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": POSITIONS}
SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
# Class, config, settings, tokens of a text that run (None: all that are wanted). Where positions come from differs.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int | None]] = {
    "a table": ("BertForSequenceClassification", "BertConfig", TEXT, 16),
    "a table with an offset": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, 14),
    "a table with an offset, after rows for it": ("OPTForCausalLM", "OPTConfig", TEXT | {"ffn_dim": 40}, 18 - 2),
    "a table, counted from the mask": ("BioGptForCausalLM", "BioGptConfig", TEXT, 16),
    "a table of a causal model": ("GPT2LMHeadModel", "GPT2Config", GPT, 16),
    "a table that checks itself": ("CLIPTextModel", "CLIPTextConfig", TEXT | {"eos_token_id": 2}, 16),
    "a table and windows": (
        "LongformerForSequenceClassification",
        "LongformerConfig",
        TEXT | {"attention_window": 4},
        14,
    ),
    "angles in a buffer": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}, 16),
    "sinusoids in an attribute": ("CTRLLMHeadModel", "CTRLConfig", GPT | {"dff": 40}, 16),
    "a bias of fixed width": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16},
        16,
    ),
    "a table beside parallel lists": (
        "XLMForSequenceClassification",
        "XLMConfig",
        {"vocab_size": 99, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 16},
        16,
    ),
    "rotary": ("LlamaForCausalLM", "LlamaConfig", TEXT, None),
    "relative": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        None,
    ),
    "an encoder and a decoder": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQ2SEQ | {"max_position_embeddings": 16},
        16,
    ),
    "an encoder longer than its decoder": (
        "LEDForConditionalGeneration",
        "LEDConfig",
        SEQ2SEQ | {"max_encoder_position_embeddings": 24, "max_decoder_position_embeddings": 16, "attention_window": 4},
        24,
    ),
}
TARGETS = {"an encoder and a decoder": 16, "an encoder longer than its decoder": 16, "relative": None}
METHODS = {"alone": None, "prefix": PrefixTuning(length=FRONT), "prompt": PromptTuning(length=FRONT, init="normal")}


def kit_of(family: str) -> Kit:
    name, config, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    return kitout.attach(getattr(transformers, name)(getattr(transformers, config)(**settings)).eval())


def does_run(kit: Kit, num_tokens: int, num_targets: int | None = None) -> bool:
    batch = token_limit.long_batch(kit.base, num_tokens, num_targets)
    assert batch is not None
    assert batch["input_ids"].shape == (1, num_tokens)
    try:
        kit(**batch)
    except (RuntimeError, IndexError, ValueError, KitoutError):
        return False
    return True


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_runs_and_one_more_token_does_not(family: str, method: str) -> None:
    kit = kit_of(family)
    chosen = METHODS[method]
    if chosen is not None:
        try:
            kit.add("front", chosen)
        except KitoutError:
            pytest.skip("the method is refused here")
        kit.use("front")
        if not does_run(kit, 4, 2):
            pytest.skip("the method does not run here")
    expected = FAMILIES[family][3]
    limit = max_tokens(kit, WANTED)
    if chosen is None:
        assert limit == (expected or WANTED)
    assert does_run(kit, limit, 2)
    assert limit == WANTED or not does_run(kit, limit + 1, 2)
    if family in TARGETS:
        target = max_tokens(kit, WANTED, "target")
        if chosen is None:
            assert target == (TARGETS[family] or WANTED)
        assert does_run(kit, 4, target)
        assert target == WANTED or not does_run(kit, 4, target + 1)


def test_virtual_tokens_are_counted_by_the_table_and_not_by_the_config() -> None:
    kit = kit_of("a table with an offset")
    kit.add("front", METHODS["prefix"])  # type: ignore[arg-type]
    kit.use("front")
    with pytest.raises(RouteError, match=r"2 positions too long.*the model has 14; shorten the text by 2"):
        kit(**token_limit.long_batch(kit.base, 13, None))  # type: ignore[arg-type]


def test_what_was_found_is_found_again_without_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_of("angles in a buffer")
    kit.add("scale", IA3())
    kit.use("scale")
    assert max_tokens(kit, WANTED) == 16
    monkeypatch.setattr(token_limit, "long_batch", None)
    monkeypatch.setattr("kitout.evaluate.ask.text_limit.long_batch", None)
    assert [max_tokens(kit, wanted) for wanted in (5, 16, 17, 99)] == [5, 16, 16, 16]


def test_a_lookup_out_of_range_is_an_error_before_it_is_made() -> None:
    table, checked = torch.zeros(4, 2), token_limit._CheckedLookups
    lookups: list[Any] = [
        lambda i: torch.nn.functional.embedding(i, table), lambda i: table[i], lambda i: table[:, i],
        lambda i: table.index_select(0, i), lambda i: torch.gather(table, 0, i[:, None].expand(-1, 2)),
    ]  # fmt: skip
    for number, lookup in enumerate(lookups):
        last = 1 if number == 2 else 3
        with checked():
            expected: Tensor = lookup(torch.tensor([last]))
            with pytest.raises(IndexError, match="out of range"):
                lookup(torch.tensor([0, last + 1]))
        assert torch.equal(lookup(torch.tensor([last])), expected)
