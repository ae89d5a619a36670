"""An evaluation of pairs and judged answers runs the model once for losses and rewards together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.objectives.test_micro_batches import OBJECTIVES
from kitout import LoRA
from kitout.align.objectives.reward_objective import RewardObjective
from kitout.align.scalar_head import head_path, scalar_head
from kitout.train.measure.predict import plan_forwards, predict
from train.fixtures import add, kit_of


@pytest.mark.parametrize("name", ["reward", "dpo", "ipo", "orpo", "simpo", "kto"])
def test_losses_and_rewards_come_of_one_forward(name: str) -> None:
    kit = kit_of("llama")
    objective, items = OBJECTIVES[name](kit)
    heads: Any = {head_path(kit): scalar_head(kit, 0)} if isinstance(objective, RewardObjective) else None
    add(kit, "job", LoRA(rank=2), heads)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = kit.base.register_forward_pre_hook(count)
    with torch.no_grad(), kit.use("job"):
        found = predict(kit, objective, items)
        assert calls == len(plan_forwards(objective, items, range(len(items))))
        handle.remove()
        batch = objective.collate(items, None)
        alone = objective.predictions(kit, batch)
    torch.testing.assert_close(torch.tensor(found.predictions), torch.tensor(alone), rtol=1e-4, atol=1e-5)
