"""Reinforcement raises the reward of held-out prompts: over three seeds the difference has an interval above 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kitout
from align.test_run import data_of
from kitout.align import reinforce
from kitout.align.measure.prompts import judge
from tiny_models import decoder

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)


def differences(
    out: Path, model: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], **settings: Any
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[seeds, prompts]: of each held-out prompt, the reward of the trained policy's answer less that of its start's."""
    rewards: list[list[float]] = []
    measure_policy = reinforce.measure_policy

    def measure(run: Any, name: str, prompts: Any, config: Any, start: Any, *how: Any) -> Any:
        rewards.extend(
            [float(total or 0) for total in judge(run, prompts, adapter, *how[:2]).values.totals]
            for adapter in (start, name)
        )
        return measure_policy(run, name, prompts, config, start, *how)

    monkeypatch.setattr(reinforce, "measure_policy", measure)
    for seed in SEEDS:
        kitout.align(
            stage="grpo", model={"name": str(model), "dtype": "float32"},
            method={"name": "LoRA", "targets": "all-linear"}, train=train | {"seed": seed},
            output={"folder": str(out / str(seed))}, log=lambda _: None, **settings,
        )  # fmt: skip
    return np.stack([np.subtract(after, before) for before, after in zip(rewards[::2], rewards[1::2], strict=True)])


def share_of_vowels(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in completions]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Whose logits differ by more than a fresh model's, so that a few steps make some tokens likely."""
    folder = decoder(tmp_path / "model")
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(10)
    base.save_pretrained(folder)
    return folder


def test_a_functions_reward_rises(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_above_zero(differences(
        tmp_path, model, monkeypatch, {"steps": 40, "lr": 1e-2}, reward="align.test_reward_rises:share_of_vowels",
        data={"train": str(data_of("grpo", tmp_path)), "validation": 0, "test": 8},
        rollout={"prompts": 4, "samples": 16, "max_new_tokens": 4},
    ))  # fmt: skip


def assert_above_zero(found: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Student's interval over the seeds, of which each is one draw: answers to prompts of one run are much alike."""
    by_seed = found.mean(1)
    half = 4.303 * by_seed.std(ddof=1) / math.sqrt(len(SEEDS))
    assert by_seed.mean() - half > 0, by_seed
