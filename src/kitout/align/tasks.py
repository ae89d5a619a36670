"""The tasks of the alignment stages, as the set-up of a run takes them: data, base, heads and objective of each kind.

They are entries as those of `kitout.train.objectives.tasks`, but of no config's `objective`: a stage of its kind makes
its own, with its settings. It knows stages, and no run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kitout.align.config.losses import DPOLoss, KTOLoss, ORPOLoss, RewardLoss, SimPOLoss
from kitout.data.encode.answers import PairEncoder, RolloutPromptEncoder, UnpairedEncoder
from kitout.train.objectives.tasks import REWARD, EncoderSettings, ObjectiveSettings, Task

if TYPE_CHECKING:
    from torch import nn

    from kitout.align.config.schema import StageRun
    from kitout.kit import Kit
    from kitout.train.objectives.objective import Objective


def task_of(stage: StageRun) -> Task:
    """The task of a stage of any kind but sft."""
    is_reward = isinstance(stage.loss, RewardLoss)
    return Task(
        stage.kind,
        "AutoModelForCausalLM",
        "text-classification" if is_reward else "text-generation",  # as the hub has reward models
        "pairs",
        _objective_builder(stage),
        _encoder_builder(stage),
        lambda _examples, _is_encoder_decoder: False,
        build_heads=_scalar_heads if is_reward else None,
        used_as=REWARD if is_reward else "causal_lm",
        kinds=stage.of_kind.reads,
        new_tokens=0 if stage.rollout is None else stage.rollout.max_new_tokens,
    )


def _scalar_heads(kit: Kit, seed: int) -> dict[str, nn.Module]:
    from kitout.align.scalar_head import head_path, scalar_head

    return {head_path(kit): scalar_head(kit, seed)}


def _objective_builder(stage: StageRun) -> Callable[[Kit, ObjectiveSettings], Objective]:
    def build(kit: Kit, _settings: ObjectiveSettings) -> Objective:
        loss = stage.loss
        if isinstance(loss, RewardLoss):
            from kitout.align.objectives.reward_objective import RewardObjective

            return RewardObjective(kit, loss)
        if isinstance(loss, DPOLoss | ORPOLoss | SimPOLoss):
            from kitout.align.objectives.preference_objective import PreferenceObjective

            return PreferenceObjective(kit, loss)
        if isinstance(loss, KTOLoss):
            from kitout.align.objectives.kto import KTOObjective

            return KTOObjective(kit, loss)
        from kitout.align.objectives.policy import PolicyObjective

        assert loss is not None
        assert stage.rollout is not None, "of a stage that samples answers"
        return PolicyObjective(kit, loss, stage.rollout.max_new_tokens, stage.rollout.temperature)

    return build


def _encoder_builder(stage: StageRun) -> Callable[[EncoderSettings], Any]:
    def build(settings: EncoderSettings) -> Any:
        given, dropped = (settings.tokenizer, settings.max_length), settings.dropped
        if stage.rollout is not None:
            new_tokens = stage.rollout.max_new_tokens
            return RolloutPromptEncoder(*given, new_tokens, settings.chat_template_kwargs, dropped=dropped)
        encoder = UnpairedEncoder if isinstance(stage.loss, KTOLoss) else PairEncoder
        return encoder(*given, settings.chat_template_kwargs, dropped)

    return build
