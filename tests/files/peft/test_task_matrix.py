"""LoRA and IA3 files of PEFT, each kind of option in each of its task types: the same logits here, and ours there.

What each option does alone is in `test_folder.py` and `test_biases.py`; prompts and prefixes by task are in
`test_virtual_tokens.py`. Here PEFT's class for the task writes the file, with the heads that it adds by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from peft_prompts import SPECIES, peft, with_head
from zoo import out

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

TASKS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
FAMILIES = {
    "llama": ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "bert": ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "t5": ("SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "attention.output.dense"], "t5": ["q", "wo"]}


def config(option: str, family: str, task: str) -> Any:
    first, second = TARGETS[family]
    both = {"task_type": task, "target_modules": [first, second]}
    if option == "ia3":
        return peft.IA3Config(**both, feedforward_modules=[second], init_ia3_weights=False)
    settings = {
        "lora-patterns": {"rank_pattern": {second: 2}, "alpha_pattern": {first: 7}, "use_rslora": True},
        "dora-biases": {"use_dora": True, "bias": "all"},
        "lora-biases": {"lora_bias": True, "init_lora_weights": True},
    }[option]
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "init_lora_weights": False} | both | settings))


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=draw) * (0.02 if "magnitude" in name else 0.1))


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return torch.stack((output.start_logits, output.end_logits)) if hasattr(output, "start_logits") else out(output)


@pytest.mark.parametrize("option", ["lora-patterns", "dora-biases", "lora-biases", "ia3"])
@pytest.mark.parametrize(("family", "task"), [(f, task) for f, tasks in FAMILIES.items() for task in tasks])
def test_both_ways(family: str, task: str, option: str, tmp_path: Path) -> None:
    build, batch = with_head(family, TASKS[task]), SPECIES[family].batch(3, 1)
    if (family, task) == ("t5", "TOKEN_CLS"):  # an encoder alone
        del batch["decoder_input_ids"]
    model = peft.get_peft_model(build(), config(option, family, task)).eval()
    randomize(model, 3)
    model.save_pretrained(tmp_path / "theirs")
    kit = kitout.attach(build())
    kitout.load_peft(kit, tmp_path / "theirs", "a")
    off = logits(kit, batch)
    kit.use("a")
    here = logits(kit, batch)
    assert (here - off).abs().max() > 1e-2
    torch.testing.assert_close(here, logits(model, batch), rtol=1e-5, atol=1e-5)
    randomize(kit["a"], 5)
    kitout.save_peft(kit, "a", tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(there, batch), logits(kit, batch), rtol=1e-5, atol=1e-5)
