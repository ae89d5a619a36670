"""Prompts and prefixes as the real peft library makes them: the cases, their folders, and kits that load them.

Values are random everywhere, as after training. Every model is built twice from its seed: one for peft, one for kitout.
PEFT is compared only where it is right itself (`Case.sides`); a prefix needs position_ids where padding is at left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn

import kitout
import zoo
from zoo import EXTRA, ZOO, out, padded

peft = pytest.importorskip("peft")
SPECIES = ZOO | EXTRA
LENGTHS = [7, 5, 4]  # of the rows of a padded batch
Side = Literal["none", "right", "left"]


def with_head(species: str, ending: str) -> Callable[[], nn.Module]:
    """The model of the zoo with another head, by the end of its class name; "Model": with none."""

    def build() -> nn.Module:
        base = SPECIES[species].build()
        base.config.num_labels = 2 if ending == "ForQuestionAnswering" else zoo.LABELS
        stem = re.sub("(For[A-Z]|LMHead)[A-Za-z]*$", "", type(base).__name__)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return zoo.randomize_model(getattr(transformers, stem + ending)(base.config), seed=0)

    return build


def classifier(species: str) -> Callable[[], nn.Module]:
    """The decoder of the zoo with a classifier in place of its head."""
    return with_head(species, "ForSequenceClassification")


@dataclass
class Case:
    """sides: the paddings at which PEFT computes what it should."""

    species: str
    kind: Literal["prompt", "prefix"]
    task: str = "CAUSAL_LM"
    settings: Mapping[str, Any] = field(default_factory=dict)
    sides: tuple[Side, ...] = ("none", "right")
    facts: Mapping[str, Any] = field(default_factory=dict)  # settings that the loaded method has beside its length
    build: Callable[[], nn.Module] | None = None

    def base(self) -> nn.Module:
        return (self.build or SPECIES[self.species].build)()

    def batch(self, side: Side = "none") -> dict[str, Tensor]:
        batch = SPECIES[self.species].batch(3, 1)
        return batch if side == "none" else padded(batch, LENGTHS, side, SPECIES[self.species].pad_id)

    def config(self) -> Any:
        cls = peft.PromptTuningConfig if self.kind == "prompt" else peft.PrefixTuningConfig
        return cls(task_type=self.task, num_virtual_tokens=4, **self.settings)


EVERY: tuple[Side, ...] = ("none", "right", "left")
POOLED = {"pooled": "prompt"}
DECODER = {"places": "decoder"}
CASES = {
    **{f"{s}-prompt": Case(s, "prompt") for s in ("llama", "qwen3", "gpt2", "gpt-neox", "gemma2", "phi3")},
    **{f"{s}-prefix": Case(s, "prefix", sides=EVERY) for s in ("llama", "qwen3", "gpt2", "gpt-neox", "gemma2", "phi3")},
    "falcon-mq-prefix": Case("falcon-mq", "prefix", settings={"num_attention_heads": 1, "token_dim": 12}),
    "gemma3n-prefix": Case("gemma3n", "prefix"),  # layers that attend to the keys of others see their prefix
    "gemma4-prefix": Case("gemma4", "prefix"),
    "opt-prompt": Case("opt", "prompt", sides=EVERY),  # counts its positions from the mask
    "llama-projected": Case("llama", "prefix", settings={"prefix_projection": True, "encoder_hidden_size": 12}),
    "qwen3-projected": Case("qwen3", "prefix", settings={"prefix_projection": True}),
    "llama-zeros": Case("llama", "prefix", settings={"init_weights": "zero"}),
    "bert-prompt": Case("bert", "prompt", "SEQ_CLS", facts=POOLED),
    "roberta-prompt": Case("roberta", "prompt", "SEQ_CLS", facts=POOLED),
    "modernbert-prompt": Case("modernbert", "prompt", "SEQ_CLS", facts=POOLED),
    "distilbert-prompt": Case(
        "distilbert", "prompt", "SEQ_CLS", facts=POOLED,
        settings={"token_dim": 48, "num_layers": 3, "num_attention_heads": 4},
    ),
    "bert-prefix": Case("bert", "prefix", "SEQ_CLS", sides=EVERY),
    "roberta-prefix": Case("roberta", "prefix", "SEQ_CLS"),
    **{
        f"{s}-cls-prompt": Case(s, "prompt", "SEQ_CLS", sides=("none",), build=classifier(s))  # it reads pads at right
        for s in ("llama", "qwen3", "gpt2")
    },
    **{
        f"{s}-cls-prefix": Case(s, "prefix", "SEQ_CLS", sides=EVERY, build=classifier(s))
        for s in ("llama", "qwen3", "gpt2")
    },
    "t5-prompt": Case("t5", "prompt", "SEQ_2_SEQ_LM"),
    "bart-prompt": Case("bart", "prompt", "SEQ_2_SEQ_LM"),
    "t5-prompt-of-one": Case("t5", "prompt", "SEQ_2_SEQ_LM", {"num_transformer_submodules": 1}),
    "t5-prefix": Case("t5", "prefix", "SEQ_2_SEQ_LM", {"token_dim": 64}, EVERY, DECODER),
    "t5-prefix-of-three": Case("t5", "prefix", "SEQ_2_SEQ_LM", {"token_dim": 64, "num_layers": 3}, EVERY, DECODER),
    "bart-prefix": Case("bart", "prefix", "SEQ_2_SEQ_LM", {"num_layers": 3}, EVERY, DECODER),
    "bart-prefix-of-four": Case("bart", "prefix", "SEQ_2_SEQ_LM", {"num_layers": 4}, EVERY, DECODER),
}  # fmt: skip


def _of_task(species: str, kind: Literal["prompt", "prefix"], ending: str, task: str, **facts: Any) -> Case:
    sizes = {"token_dim": 48, "num_layers": 3, "num_attention_heads": 4} if species == "distilbert" else {}
    return Case(species, kind, task, sizes, build=with_head(species, ending), facts=facts)


# The tasks without a loss over the text's next tokens or a class of it: hidden states, labels of tokens, spans.
ENDINGS = {"Model": "FEATURE_EXTRACTION", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}
OF_TASKS = {
    **{
        f"{s}-{ending}-{kind}": _of_task(s, kind, ending, task)
        for s in ("llama", "bert")
        for ending, task in ENDINGS.items()
        for kind in ("prompt", "prefix")
    },
    **{
        f"{s}-{ending}-{kind}": _of_task(s, kind, ending, ENDINGS[ending])
        for s, ending, kind in (
            ("gpt2", "Model", "prompt"),
            ("gpt2", "ForTokenClassification", "prefix"),
            ("roberta", "Model", "prompt"),
            ("roberta", "ForQuestionAnswering", "prefix"),
            ("distilbert", "ForTokenClassification", "prompt"),
            ("modernbert", "ForQuestionAnswering", "prompt"),
        )
    },
    "t5-Model-prompt": _of_task("t5", "prompt", "Model", "FEATURE_EXTRACTION"),
    "t5-EncoderModel-prompt": _of_task("t5", "prompt", "EncoderModel", "FEATURE_EXTRACTION"),
    "bart-ForConditionalGeneration": _of_task("bart", "prompt", "ForConditionalGeneration", "FEATURE_EXTRACTION"),
    "bert-ForMaskedLM-prompt": _of_task("bert", "prompt", "ForMaskedLM", "FEATURE_EXTRACTION"),
    "bert-ForMaskedLM-prefix": _of_task("bert", "prefix", "ForMaskedLM", "FEATURE_EXTRACTION"),
    "llama-ForCausalLM-prefix": _of_task("llama", "prefix", "ForCausalLM", "FEATURE_EXTRACTION"),
    "bert-classifier-prompt": _of_task(
        "bert", "prompt", "ForSequenceClassification", "FEATURE_EXTRACTION", pooled="prompt"
    ),
}


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=draw) * 0.3)


def saved_by_peft(case: Case, folder: Path) -> Any:
    model = peft.get_peft_model(case.base(), case.config()).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def in_kitout(case: Case, folder: Path) -> kitout.Kit:
    kit = kitout.attach(case.base())
    kitout.load_peft(kit, folder, "a")
    kit.use("a")
    return kit


def in_peft(case: Case, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(case.base(), folder).eval()


@torch.no_grad()
def logits(model: Any, case: Case, side: Side = "none", positions: bool = False) -> Tensor:
    """positions: given, which PEFT's prefix needs where padding is at the left."""
    batch = case.batch(side)
    given = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)} if positions else {}
    if case.build is not None and "EncoderModel" in type(case.build()).__name__:
        batch.pop("decoder_input_ids")
    output = model(**batch, **given)
    spans = hasattr(output, "start_logits")
    got = torch.stack((output.start_logits, output.end_logits), -1) if spans else out(output)
    return of_text(got, batch, case)


def of_text(got: Tensor, batch: Mapping[str, Tensor], case: Case) -> Tensor:
    """Of what is by token the real tokens: PEFT leaves the outputs of prompts in front."""
    if case.task in ("SEQ_CLS", "SEQ_2_SEQ_LM") or "decoder_input_ids" in batch or got.ndim == 2:
        return got
    return got[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def same(case: Case, kit: kitout.Kit, model: Any) -> None:
    for side in case.sides:
        given = side == "left" and case.kind == "prefix" and case.task != "SEQ_2_SEQ_LM"
        torch.testing.assert_close(
            logits(kit, case, side), logits(model, case, side, positions=given), rtol=1e-5, atol=1e-5
        )
