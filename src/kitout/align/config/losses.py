"""The settings of each kind's loss, with their defaults and why.

Formulas and sources are docs/align.md's. A setting that two losses share has one name: `beta` weighs the distance to
the reference (or, without one, the difference of the answers), `clip` bounds the ratio of new to old probability. It
knows no tensor and no stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from kitout.train.config.sections import ConfigSection

# What TRL and others call them -> what to write.
ELSEWHERE: dict[str, str] = {
    "loss.variant": "loss_type variant policy_loss",
    "loss.beta": "beta kl_coef init_kl_coef kl_coeff pref_beta simpo_beta",
    "loss.gamma": "gamma simpo_gamma gamma_beta_ratio",
    "loss.lambda": "lam lambda gae_lambda",
    "loss.label_smoothing": "label_smoothing cdpo",
    "loss.cpo_alpha": "cpo_alpha nll_weight rpo_alpha",
    "loss.desirable_weight": "desirable_weight kto_chosen_weight",
    "loss.undesirable_weight": "undesirable_weight kto_rejected_weight",
    "loss.centering": "center_rewards_coefficient centering centring",
    "loss.clip": "clip epsilon cliprange clip_eps eps_clip",
    "loss.clip_high": "clip_high epsilon_high clip_ratio_high",
    "loss.scale": "scale scale_rewards normalize_advantage",
    "loss.mask_truncated": "mask_truncated mask_truncated_completions overlong_filtering",
    "loss.iterations": "iterations num_iterations mu",
    "loss.epochs": "num_ppo_epochs ppo_epochs",
    "loss.minibatches": "minibatches num_mini_batches",
    "loss.value_clip": "value_clip cliprange_value",
    "loss.value_coefficient": "value_coefficient vf_coef vf_coeff",
    "loss.kl_target (and loss.kl_horizon)": "adaptive_kl adap_kl_ctrl target_kl kl_target kl_horizon horizon",
    "loss.whiten_rewards": "whiten_rewards",
    "loss.missing_end_penalty": "missing_end_penalty missing_eos_penalty",
}


class LossSettings(ConfigSection):
    """What every kind's loss has in common."""

    type_name: ClassVar[str] = "loss"


class RewardLoss(LossSettings):
    """Reward model: Bradley-Terry over pairs. A pair's own margin, where the data has one, is always used."""

    centering: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of both scores, which holds scores around 0 (pairs leave their offset free, and PPO
    adds scores up); 0.01 as the paper has it, 0: off."""


class DPOLoss(LossSettings):
    """DPO: the pair's log-ratios to the reference."""

    variant: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO itself; ipo: a squared distance, for pairs without noise, which DPO overfits; hinge: a margin."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to its reference; 0.1 as in the paper, for ipo its tau."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The fraction of pairs taken to be the wrong way round (cDPO), for variant sigmoid; 0: labels are right."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> DPOLoss:
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError(f"label_smoothing: is for variant=sigmoid, not for variant={self.variant}: leave it out")
        return self


class ORPOLoss(LossSettings):
    """ORPO: the chosen answer's own loss and the odds ratio of both, without a reference."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the chosen answer's loss; 0.1 as in the paper (its lambda)."""


class SimPOLoss(LossSettings):
    """SimPO: the difference of mean log-probabilities over a margin, without a reference."""

    beta: float = Field(default=2.0, gt=0)
    """Scale of the difference; the paper finds 2 to 2.5 (means per token are small, so it is larger than DPO's)."""
    gamma: float = Field(default=1.0, ge=0)
    """The margin that the scaled difference has to pass; 1 is half of beta, the paper has 0.3 to 0.5 of it."""
    cpo_alpha: float = Field(default=0.0, ge=0)
    """Weight of the chosen answer's own loss beside it (CPO); 0: SimPO itself."""


class KTOLoss(LossSettings):
    """KTO: single answers, each desirable or not, against the policy's distance from the reference."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to its reference; 0.1 as in the paper."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of desirable answers; the paper has all of them weigh 1 to 1.33 times all undesirable ones, so raise it
    where they are few."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of undesirable answers."""


class SampledLoss(LossSettings):
    """What the losses on sampled answers share."""

    clip: float = Field(default=0.2, gt=0, lt=1)
    """The ratio of new to old probability counts between 1 - clip and 1 + clip only; 0.2 as in PPO's paper."""


class GRPOLoss(SampledLoss):
    """GRPO: each answer against the others to its prompt, without a value model."""

    variant: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """How tokens are averaged. dapo: over all tokens of the step, so long answers count as they are; grpo: within each
    answer first; dr_grpo: over the length allowed, which favors no length."""
    clip_high: float | None = Field(default=None, gt=0)
    """The upper bound alone; default: as clip. DAPO uses 0.28, so that rare tokens may grow."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference (k3); 0, as is usual now: no reference is computed. The paper has 0.04."""
    scale: Literal["group", "batch", "none"] = "group"
    """What rewards are divided by: the deviation of their group, or of the step, or nothing. With variant dr_grpo the
    default is none."""
    mask_truncated: bool = False
    """Answers that are cut at rollout.max_new_tokens train nothing; off: they count with the reward they get."""
    iterations: int = Field(default=1, gt=0)
    """Optimizer steps on the same answers; 1: the ratio is 1 and nothing is clipped."""

    @model_validator(mode="before")
    @classmethod
    def _scale_of_variant(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("variant") == "dr_grpo":
            return {"scale": "none", **values}
        return values


class RLOOLoss(SampledLoss):
    """RLOO: REINFORCE on whole answers, the others to the prompt as baseline."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL to the reference (k1), which is part of the reward; 0.05 as TRL has it, 0: no reference."""


class PPOLoss(SampledLoss):
    """PPO: a value adapter estimates what is still to come, token by token."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    value_clip: float = Field(default=0.2, gt=0)
    """A value moves at most so far from its old one; 0.2 as clip."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value's loss beside the policy's; 0.1 as TRL had it."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token; 1: an answer's end counts in full for its first token."""
    lambda_: float = Field(default=0.95, ge=0, le=1, alias="lambda")
    """Of the generalized advantage estimate: 0 trusts the values, 1 the rewards; 0.95 is usual."""
    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL to the reference (k1), which is part of every token's reward; 0: no reference."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats of KL per answer that beta is steered to; default: beta stays. 6 is usual (Ziegler et al. 2019)."""
    kl_horizon: int = Field(default=10_000, gt=0)
    """Answers over which beta is steered; only with kl_target."""
    epochs: int = Field(default=4, gt=0)
    """Passes over the answers of one rollout."""
    minibatches: int = Field(default=1, gt=0)
    """Parts that a pass is divided into, an optimizer step each; 1 is steadiest."""
    whiten_rewards: bool = False
    """Rewards get a deviation of 1 over the rollout and keep their mean; off: advantages are whitened anyway."""
    missing_end_penalty: float | None = Field(default=None, ge=0)
    """Taken from the score of an answer that does not end by itself; default: nothing."""


Loss = (
    RewardLoss | DPOLoss | ORPOLoss | SimPOLoss | KTOLoss | GRPOLoss | RLOOLoss | PPOLoss
)  # of one stage; a stage of kind sft has none
