"""A two-token bandit: answers of one token, one of which is rewarded; every kind of reinforcement finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kitout
from kitout.evaluate.significance.seeds import compare_methods
from kitout.train.metrics_log import read_metrics
from tiny_models import jsonl

pytest.importorskip("accelerate")

TOKENS = ["a", "b", "<eos>", "<unk>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tokens and nothing else."""
    folder = tmp_path_factory.mktemp("bandit")
    words = Tokenizer(WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0, eos_token_id=2, bos_token_id=None, pad_token_id=None, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def is_a(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float(text == "a") for text in completions]


def prompts(folder: Path) -> Path:
    """All texts of five letters."""
    rows = [{"prompt": " ".join("ab"[int(bit)] for bit in f"{i:05b}")} for i in range(32)]
    return jsonl(folder / "prompts.jsonl", rows)


KINDS: dict[str, dict[str, Any]] = {
    "dapo": {"stage": "grpo"},
    "grpo": {"stage": "grpo", "loss": {"variant": "grpo", "beta": 0.01}},
    "dr_grpo": {"stage": "grpo", "loss": {"variant": "dr_grpo", "iterations": 2}},
    "rloo": {"stage": "rloo"},
    "ppo": {"stage": "ppo", "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 1}},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_reinforcement_finds_the_rewarded_token(name: str, model: Path, tmp_path: Path) -> None:
    data = prompts(tmp_path)
    settings: dict[str, Any] = {"rollout": {"prompts": 4, "samples": 8, "max_new_tokens": 1}} | KINDS[name]
    steps = {"ppo": 120, "dr_grpo": 80}.get(name, 40)
    result = kitout.align(
        model={"name": str(model), "dtype": "float32"}, method={"name": "LoRA", "rank": 4, "targets": "all-linear"},
        data={"train": {"path": str(data), "format": "raw_prompts"}, "validation": 0, "test": 6},
        reward="align.test_bandit:is_a",
        train={"steps": steps, "lr": 5e-3 if name == "ppo" else 2e-2, "lr_schedule": "constant"},
        output={"folder": str(tmp_path / "run")}, log=lambda _line: None, **settings,
    )  # fmt: skip
    kit = kitout.load(tmp_path / "run" / "adapter").kit
    with torch.no_grad():
        probabilities = kit(input_ids=torch.tensor([[1, 0, 0]])).logits[0, -1].softmax(-1)
    assert probabilities[0] > 0.95, probabilities
    assert next(iter(result.comparisons.values())).changes[0].tuned.value == 1.0


def test_the_reward_rises_over_three_seeds(model: Path, tmp_path: Path) -> None:
    """Sampled answers of the last rounds against the first: the interval over seeds and rounds is above 0.

    The same with a small language model on a task of reasoning-gym is studies/align_gym.py.
    """
    data = prompts(tmp_path)
    rewards = []
    for seed in range(3):
        out = tmp_path / str(seed)
        kitout.align(
            stage="grpo", model={"name": str(model), "dtype": "float32"}, reward="align.test_bandit:is_a",
            method={"name": "LoRA", "rank": 4, "targets": "all-linear"},
            data={"train": {"path": str(data), "format": "raw_prompts"}, "validation": 0, "test": 0},
            rollout={"prompts": 2, "samples": 8, "max_new_tokens": 1},
            train={"steps": 16, "lr": 2e-2, "lr_schedule": "constant", "seed": seed},
            output={"folder": str(out)}, log=lambda _line: None,
        )  # fmt: skip
        rewards.append([row["reward"] for row in read_metrics(out / "metrics.jsonl") if "reward" in row])
    assert [len(one) for one in rewards] == [16] * 3
    found = compare_methods([one[-6:] for one in rewards], [one[:6] for one in rewards], share=False)
    assert found.low > 0, found.verdict
