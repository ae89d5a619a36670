"""PEFT's prompts and prefixes where they do not go over: what is refused, with the reason, and where PEFT itself fails.

The last section holds what peft 0.21.2 on transformers 5 cannot do or gets wrong, by name and with its own error, so
that a release which mends it shows. The cases are in `peft_prompts.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kitout
from kitout import PrefixTuning, PromptTuning
from kitout.errors import FileError
from peft_prompts import CASES, LENGTHS, Case, classifier, in_kitout, logits, peft, saved_by_peft, with_head
from zoo import EXTRA, ZOO, out

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)  # peft's own


# --- what must be refused --------------------------------------------------------------------------------------------


def mean_pooled() -> nn.Module:
    model = EXTRA["modernbert"].build()
    model.config.classifier_pooling = "mean"
    return model


@pytest.mark.parametrize(
    ("build", "method", "strength", "reason"),
    [
        (ZOO["bert"].build, PromptTuning(), 1.0, r"train it with PromptTuning\(pooled='prompt'\)"),
        (mean_pooled, PromptTuning(pooled="prompt"), 1.0, "classifier_pooling='mean'"),
        (ZOO["gpt2"].build, PromptTuning(place="after"), 1.0, "place='after'"),
        (ZOO["llama"].build, PrefixTuning(), 0.5, "strength 0.5"),
        (ZOO["llama"].build, PrefixTuning(layers="1"), 1.0, "in 1 of the 2"),
        (EXTRA["falcon"].build, PrefixTuning(), 1.0, "keys of 2 heads, and PEFT's prefix .* cache: 4"),
        (ZOO["t5"].build, PrefixTuning(), 1.0, "places='decoder'"),
        (ZOO["t5"].build, PrefixTuning(places="encoder"), 1.0, "is in the decoder"),
        (ZOO["t5"].build, PromptTuning(stacks="both"), 1.0, "are the encoder's alone"),
        (ZOO["t5"].build, PromptTuning(stacks="decoder"), 1.0, "are the encoder's alone"),
        (ZOO["bert"].build, PromptTuning(pooled="text"), 1.0, "with PEFT an encoder's classifier reads"),
        (with_head("bert", "Model"), PromptTuning(pooled="prompt"), 1.0, "is for classifiers of whole texts"),
        (with_head("bert", "ForNextSentencePrediction"), PromptTuning(), 1.0, "may read the first token"),
        (with_head("t5", "Model"), PrefixTuning(places="decoder"), 1.0, "does not work in a model with encoder and"),
        (EXTRA["distilbert"].build, PrefixTuning(), 1.0, "takes no past_key_values"),  # PEFT refuses
        (with_head("distilbert", "Model"), PrefixTuning(), 1.0, "takes no past_key_values"),  # PEFT ignores it
        (with_head("bart", "ForSequenceClassification"), PromptTuning(), 1.0, "do not work in a classifier with"),
    ],
)  # fmt: skip
def test_export_refuses_with_the_reason(
    build: Callable[[], nn.Module], method: kitout.Method, strength: float, reason: str, tmp_path: Path
) -> None:
    kit = kitout.attach(build())
    kit.add("a", method)
    kit.strength("a", strength)
    with pytest.raises(FileError, match=reason):
        kitout.save_peft(kit, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    held = load_file(folder / "adapter_model.safetensors")
    edit(held)
    save_file(held, folder / "adapter_model.safetensors")


def fields(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder, edit)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("llama-prefix", fields(peft_type="CARTRIDGE"), "peft_type is 'CARTRIDGE'"),
        ("llama-prompt", fields(peft_type="P_TUNING"), "peft_type is 'P_TUNING'"),
        ("llama-prompt", fields(peft_type="MULTITASK_PROMPT_TUNING"), "kitout reads LORA, IA3, PROMPT_TUNING"),
        ("llama-prompt", fields(num_ranks=2), "num_ranks=2 may change the function"),
        ("llama-prompt", fields(task_type="TOKEN_CLS"), "LlamaForCausalLM is one of CAUSAL_LM"),
        ("llama-prompt", fields(task_type="IMAGE_CLS"), "task_type is 'IMAGE_CLS'"),
        ("t5-prefix", fields(task_type="FEATURE_EXTRACTION"), "does not work in a model with encoder and decoder"),
        ("llama-prompt", fields(task_type=None), "task_type is 'None'"),
        ("llama-prompt", fields(task_type="SEQ_CLS"), "LlamaForCausalLM is one of CAUSAL_LM"),
        ("llama-prompt", fields(num_virtual_tokens=None), "num_virtual_tokens is missing"),
        ("llama-prompt", fields(num_virtual_tokens=0), "num_virtual_tokens=0 must be at least 1"),
        ("llama-prompt", fields(num_virtual_tokens="4"), "is not a number"),
        ("llama-prompt", fields(num_virtual_tokens=2**30), "1073741824 prompts here take"),
        ("llama-prompt", fields(num_transformer_submodules=2), "makes no sense for CAUSAL_LM"),
        ("llama-prompt", fields(token_dim=24), r"token_dim=24"),
        ("llama-prefix", fields(num_attention_heads=4), "2 heads in 24 channels"),
        ("llama-prefix", fields(num_layers=3), "2 layers of 2 heads"),
        ("llama-prefix", fields(num_virtual_tokens=3), r"here take \[3, 96\]"),
        ("t5-prefix", fields(num_transformer_submodules=1), "makes no sense for SEQ_2_SEQ_LM"),
        ("t5-prefix", fields(num_layers=1), "2 layers of 4 heads"),
        ("llama-prompt", tensors(lambda t: t.update({"prompt_embeddings": torch.zeros(4, 47)})), r"shape \[4, 47\]"),
        ("llama-prefix", tensors(lambda t: t.update({"prompt_embeddings": torch.zeros(4, 96, 1)})), "here take"),
        ("llama-prefix", tensors(lambda t: t.pop("prompt_embeddings")), "'prompt_embeddings' is missing"),
        ("llama-prefix", tensors(lambda t: t.update(strange=torch.zeros(1))), "unexpected key 'strange'"),
        ("llama-prefix", tensors(lambda t: t["prompt_embeddings"].fill_(torch.inf)), "NaN or infinity"),
        ("llama-prefix", tensors(lambda t: t.update(prompt_embeddings=torch.zeros(4, 96).int())), "dtype"),
        ("bert-prefix", tensors(lambda t: t.pop("base_model.classifier.bias")), "classifier.bias' is missing"),
        ("bert-prefix", tensors(lambda t: [t.pop(f"base_model.classifier.{n}") for n in ("bias", "weight")]),
         "modules_to_save names classifier, and the file has no tensors"),
        ("llama-prompt", lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(name: str, spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    saved_by_peft(CASES[name], tmp_path)
    spoil(tmp_path)
    refused(CASES[name].base(), tmp_path, said)


@pytest.mark.parametrize(
    ("name", "build", "said"),
    [
        ("llama-prefix", ZOO["gpt2"].build, "2 layers of 4 heads in 48 channels"),
        ("gpt2-prompt", ZOO["bert"].build, "BertForSequenceClassification is one of SEQ_CLS"),
        ("t5-prefix", ZOO["llama"].build, "LlamaForCausalLM is one of CAUSAL_LM"),
        ("modernbert-prompt", mean_pooled, "classifier_pooling='mean'"),
        ("llama-prompt", lambda: ZOO["llama"].build().model, "LlamaModel is one of FEATURE_EXTRACTION"),
        ("bert-prompt", classifier("gpt2"), "unexpected key"),
    ],
)
def test_another_base_is_refused(name: str, build: Callable[[], nn.Module], said: str, tmp_path: Path) -> None:
    saved_by_peft(CASES[name], tmp_path)
    refused(build(), tmp_path, said)


def refused(base: nn.Module, folder: Path, said: str) -> None:
    kit = kitout.attach(base)
    with pytest.raises(FileError, match=said):
        kitout.load_peft(kit, folder, "a")
    assert not kit.names


# --- what peft 0.21.2 on transformers 5 cannot do itself -------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "error", "said"),
    [
        # The width of a head is taken for d_model / heads, and the depth of the decoder for the encoder's.
        (Case("t5", "prefix", "SEQ_2_SEQ_LM"), RuntimeError, "Sizes of tensors must match"),
        (Case("bart", "prefix", "SEQ_2_SEQ_LM"), IndexError, "out of range"),
        # One submodule makes a cache that the cross-attention shares.
        (
            Case("t5", "prefix", "SEQ_2_SEQ_LM", {"token_dim": 64, "num_transformer_submodules": 1}),
            RuntimeError,
            "must match the size",
        ),
        (
            Case("distilbert", "prefix", "SEQ_CLS", {"token_dim": 48, "num_layers": 3, "num_attention_heads": 4}),
            ValueError,
            "does not support past key values",
        ),
    ],
    ids=["head-width", "decoder-depth", "one-submodule", "no-cache"],
)
def test_peft_itself_fails(case: Case, error: type[Exception], said: str) -> None:
    model = peft.get_peft_model(case.base(), case.config()).eval()
    with pytest.raises(error, match=said):
        model(**case.batch("right"))


def test_peft_itself_cannot_train_on(tmp_path: Path) -> None:
    saved_by_peft(CASES["llama-prompt"], tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path, is_trainable=True)


def test_peft_itself_shares_a_prefix_between_the_layers_of_an_even_decoder(tmp_path: Path) -> None:
    """Of what its file holds for two layers only the first is read, for both; ours then train apart."""
    case = CASES["t5-prefix"]
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    assert len({p.detach().numpy().tobytes() for p in kit["a"].parameters()}) == 1
    before = logits(model, case)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight[:, 128:] += 1.0  # the second layer's
    assert torch.equal(logits(model, case), before)


@pytest.mark.parametrize("name", ["llama-prompt", "gpt2-prompt", "t5-prompt", "bart-prompt"])
def test_left_padding_where_peft_itself_is_wrong(name: str, tmp_path: Path) -> None:
    """A prompt goes before the pads there, and positions are not taken: another text for the same tokens."""
    case = CASES[name]
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    assert (logits(model, case, "left") - logits(model, case, "right")).abs().max() > 1e-2
    torch.testing.assert_close(logits(kit, case, "left"), logits(kit, case, "right"), rtol=1e-5, atol=1e-5)


def test_right_padding_where_peft_itself_is_wrong(tmp_path: Path) -> None:
    """A decoder's classifier finds the last token by its id; prompts come as embeddings, so PEFT's reads a pad."""
    case = CASES["llama-cls-prompt"]
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    batch = case.batch("right")
    with torch.no_grad():
        short = {k: v[1:2, : LENGTHS[1]] for k, v in batch.items()}
        alone = out(model(**short))
        torch.testing.assert_close(out(kit(**batch))[1:2], alone, rtol=1e-5, atol=1e-5)
        assert (out(model(**batch))[1:2] - alone).abs().max() > 1e-2
