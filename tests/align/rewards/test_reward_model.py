"""A reward adapter's values: its scalar head at the last token, the same in any batch and after a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kitout
from kitout import IA3, Kit, LoRA
from kitout.align.rewards.reward import AnswerBatch
from kitout.align.rewards.reward_model import ModelReward, load_reward_model
from kitout.align.scalar_head import head_path, scalar_head
from kitout.data.encode.item import EncodedExample
from kitout.errors import ConfigError, RewardError
from zoo import ZOO

ROWS = [(7, 8, 9, 2), (5, 6), (40, 41, 42, 43, 44, 45, 46, 2), (11,)]
ANSWERS = AnswerBatch([""] * 4, [""] * 4, [{}] * 4, [EncodedExample(ids) for ids in ROWS])


def kit_with_reward(name: str = "llama") -> Kit:
    kit = kitout.attach(ZOO[name].build().double())
    kit.add("taste", LoRA(targets="all-linear"), seed=1, heads={head_path(kit): scalar_head(kit, seed=2)})
    kit.add("policy", IA3(), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in ("taste", "policy"):
            for value in kit[adapter].parameters():
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype), alpha=0.3)
    return kit


@torch.no_grad()
def test_a_value_is_the_scalar_at_the_last_token_whatever_is_active() -> None:
    kit = kit_with_reward()
    with kit.use("taste"):
        expected = [kit(input_ids=torch.tensor([ids])).logits[0, -1, 0].item() for ids in ROWS]
    kit.use("policy")
    for chunk_size in (1, 3, 100):
        assert ModelReward("taste", kit, "taste", chunk_size).score(ANSWERS) == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 4
    assert kit.active == "policy"


def test_a_saved_reward_judges_alike_on_another_base(tmp_path: Path) -> None:
    kit = kit_with_reward()
    expected = ModelReward("taste", kit, "taste").score(ANSWERS)
    kit.save("taste", tmp_path / "taste")
    other = kitout.attach(ZOO["llama"].build().double())
    reward = load_reward_model(other, tmp_path / "taste", "reward", "taste")
    assert reward.score(ANSWERS) == expected
    assert not any(value.requires_grad for value in other["reward"].parameters())


def test_what_judges_nothing_is_refused(tmp_path: Path) -> None:
    kit = kit_with_reward()
    kit.save("policy", tmp_path / "policy")
    other = kitout.attach(ZOO["llama"].build().double())
    with pytest.raises(RewardError, match=r"reward mine: the adapter in .*policy has no scalar head"):
        load_reward_model(other, tmp_path / "policy", "reward", "mine")
    with pytest.raises(RewardError, match=r"reward mine: .*nothing"):
        load_reward_model(other, tmp_path / "nothing", "reward", "mine")
    assert other.names == []


def test_an_answer_longer_than_the_model_reads_is_named() -> None:
    kit = kit_with_reward("gpt2")
    limit = int(kit.config.n_positions)
    long = AnswerBatch(["", ""], ["", ""], [{}, {}], [EncodedExample((7,)), EncodedExample((7,) * (limit + 3))])
    with pytest.raises(ConfigError, match=f"number 1 has {limit + 3} tokens, and the model reads {limit}"):
        ModelReward("taste", kit, "taste").score(long)
