"""A head of another width than the config says: losses, configs of merged models and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import kitout
from kitout import Kit, LoRA
from kitout.errors import ConfigError, NotMergeable
from zoo import VOCAB, D, image_batch, text_batch

SMALL = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": VOCAB, "pad_token_id": 0}
# The model class, its config, the head's path, and the shape of the labels of three rows.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, "classifier"),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", TEXT, "classifier"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, "classifier.out_proj"),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", TEXT, "score"),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, "classifier"),
}


def model_with(name: str, num_labels: int, **more: Any) -> Any:
    model, config, settings, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings, num_labels=num_labels, **more)
    return getattr(transformers, model)(made).eval()


def batch_and_labels(name: str, num_labels: int) -> tuple[dict[str, Tensor], Tensor]:
    batch = image_batch(3) if name == "vit" else text_batch(3)
    shape = batch["input_ids"].shape if name == "bert-tokens" else (3,)
    if num_labels == 1 and name != "bert-tokens":
        return batch, torch.tensor([0.3, -1.0, 2.0])
    return batch, torch.randint(0, num_labels, shape, generator=torch.Generator().manual_seed(0))


def kit_with_head(name: str, old: int, new: int, **more: Any) -> tuple[Kit, nn.Module]:
    """A kit on a model of `old` labels, an adapter with a head of `new`, and a plain model of `new` with its values."""
    path = MODELS[name][3]
    model, plain = model_with(name, old, **more), model_with(name, new)
    head = nn.Linear(D, new, bias=model.get_submodule(path).bias is not None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(f"{path}.")}, strict=False)
    plain.get_submodule(path).load_state_dict(head.state_dict())
    kit = kitout.attach(model)
    kit.add("a", LoRA(rank=2), heads={path: head})
    return kit, plain


@pytest.mark.parametrize(("old", "new"), [(2, 3), (1, 3), (3, 1), (1, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_config_follow_the_head(name: str, old: int, new: int, tmp_path: Path) -> None:
    kit, plain = kit_with_head(name, old, new)
    batch, labels = batch_and_labels(name, new)
    before = kit.config.to_dict()
    with torch.no_grad():
        want = plain(**batch, labels=labels)
        with kit.use("a"):
            here = kit(**batch, labels=labels)
        torch.testing.assert_close(here.loss, want.loss)
        assert kit.config.to_dict() == before
        kit.merge("a")
        torch.testing.assert_close(kit(**batch, labels=labels).loss, want.loss)
        kit.unmerge()
        assert kit.config.to_dict() == before
        copied: Any = kit.merged_copy("a")
        assert copied.config.num_labels == new
        assert len(copied.config.id2label) == new
        copied.save_pretrained(tmp_path)
        reloaded, report = type(copied).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        again = reloaded(**batch, labels=labels)
        torch.testing.assert_close(again.loss, want.loss)
        torch.testing.assert_close(again.logits, want.logits)
    assert kit.config.to_dict() == before


def test_a_kind_of_loss_the_base_settled_on_does_not_bind_the_head() -> None:
    kit, plain = kit_with_head("bert", 1, 3)
    batch, labels = batch_and_labels("bert", 3)
    kit(**batch, labels=torch.tensor([0.1, 0.2, 0.3]))  # transformers writes problem_type="regression" here
    assert kit.config.problem_type == "regression"
    with kit.use("a"):
        torch.testing.assert_close(kit(**batch, labels=labels).loss, plain(**batch, labels=labels).loss)
    assert kit.config.problem_type == "regression"


def test_labels_that_would_broadcast_are_refused() -> None:
    kit, _ = kit_with_head("bert", 3, 1)
    wide, _ = kit_with_head("bert", 1, 3, problem_type="regression")
    batch = text_batch(3)
    with kit.use("a"), pytest.raises(ConfigError, match=r"labels of shape \[3, 3\] under a head of width 1"):
        kit(**batch, labels=torch.zeros(3, 3))
    with wide.use("a"), pytest.raises(ConfigError, match=r"labels of shape \[3\] under a head of width 3"):
        wide(**batch, labels=torch.zeros(3))
    with wide.use("a"):
        loss = wide(**batch, labels=torch.zeros(3, 3)).loss
        torch.testing.assert_close(loss, wide(**batch).logits.square().mean())
    kit(**batch, labels=torch.tensor([0, 1, 2]))  # the error has left no trace in the config


def test_a_wider_vocabulary_needs_both_tables(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT)
    kit = kitout.attach(transformers.LlamaForCausalLM(config).eval())
    tables = {"lm_head": nn.Linear(D, VOCAB + 8, bias=False), "model.embed_tokens": nn.Embedding(VOCAB + 8, D)}
    kit.add("head", LoRA(rank=2), heads={"lm_head": tables["lm_head"]})
    kit.add("both", LoRA(rank=2), heads=tables)
    ids = torch.tensor([[3, 4, VOCAB + 7, 5]])
    with kit.use("both"):
        here = kit(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(here.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(here.loss, expected)
    assert kit.config.vocab_size == VOCAB
    with pytest.raises(NotMergeable, match="embed_tokens"):
        kit.merged_copy("head")
    copied: Any = kit.merged_copy("both")
    copied.save_pretrained(tmp_path)
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(input_ids=ids, labels=ids).loss, here.loss)
