"""From what was written to what judges: every source is opened before the first answer is sampled.

All errors come together, so a user corrects a call once. Which adapter a folder or a stage is, and how it is put onto
the base, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kitout.align.config.gym_name import parse_gym
from kitout.align.rewards.gym_tasks import open_gym_reward
from kitout.align.rewards.reward import Reward, WeightedRewards
from kitout.align.rewards.specs import RewardSpec
from kitout.align.rewards.user_function import import_function
from kitout.errors import Errors, KitoutError, RewardError


def open_rewards(specs: Sequence[RewardSpec], open_model: Callable[[RewardSpec], Reward]) -> WeightedRewards:
    """open_model: the reward of a spec of the kinds adapter and stage. RewardError with all that is wrong."""
    errors = Errors(RewardError, "reward")
    tasks = {parse_gym(spec.text).task for spec in specs if spec.kind == "gym"}
    rewards: list[Reward] = []
    for spec in specs:
        try:
            if spec.kind == "gym":
                rewards.append(open_gym_reward(spec.text, tasks - {parse_gym(spec.text).task}))
            elif spec.kind == "function":
                rewards.append(import_function(spec.text))
            else:
                rewards.append(open_model(spec))
        except KitoutError as error:
            errors.add(str(error).removeprefix("reward "))
    errors.raise_if_any()
    return WeightedRewards(tuple(rewards), tuple(spec.weight for spec in specs))
