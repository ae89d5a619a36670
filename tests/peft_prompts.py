"""Prompts and prefixes as the real peft library makes them: the cases, their folders, and kits that load them.

Values are random everywhere, as after training. Every model is built twice from its seed: one for peft, one for kitout.
PEFT is compared only where it is right itself (`Case.sides`); a prefix needs position_ids where padding is at left.
"""

from __future__ import annotations

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


def classifier(species: str) -> Callable[[], nn.Module]:
    """The decoder of the zoo with a classifier in place of its head."""

    def build() -> nn.Module:
        base = ZOO[species].build()
        base.config.num_labels = zoo.LABELS
        name = type(base).__name__.replace("LMHeadModel", "ForCausalLM").replace("CausalLM", "SequenceClassification")
        return zoo.randomise(getattr(transformers, name)(base.config), seed=0)

    return build


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
    return of_text(out(model(**batch, **given)), batch, case)


def of_text(got: Tensor, batch: Mapping[str, Tensor], case: Case) -> Tensor:
    """Of a language model the logits of real tokens: PEFT leaves those of prompts in front."""
    if case.task != "CAUSAL_LM":
        return got
    return got[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def same(case: Case, kit: kitout.Kit, model: Any) -> None:
    for side in case.sides:
        given = side == "left" and case.kind == "prefix" and case.task != "SEQ_2_SEQ_LM"
        torch.testing.assert_close(
            logits(kit, case, side), logits(model, case, side, positions=given), rtol=1e-5, atol=1e-5
        )
