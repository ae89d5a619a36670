"""The table of kinds of stages: whatever differs between kinds outside their own files stands here, one entry each.

A kind says what data it reads, which settings its loss has, whether it samples answers and takes a reward, whether a
reference is computed, and how its defaults differ. It knows no stage and no tensor, and loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from kitout.align.config.losses import (
    DPOLoss,
    GRPOLoss,
    KTOLoss,
    LossSettings,
    ORPOLoss,
    PPOLoss,
    RewardLoss,
    RLOOLoss,
    SimPOLoss,
)

if TYPE_CHECKING:
    from kitout.method import Method


@dataclass(frozen=True)
class Kind:
    """One kind of stage."""

    title: str
    """In a line, for people."""
    data_format: str
    """The format of its data, as data.train.format names it; auto: as `kitout train` detects it."""
    loss: type[LossSettings] | None
    """The settings of its loss; None: it has none."""
    lr_factor: float
    """Its default learning rate over that of its method, which is for supervised training."""
    reference: Literal["never", "always", "by beta"] = "never"
    """Whether the log-probabilities of a reference are needed; by beta: while loss.beta is above 0."""
    samples: int = 0
    """Answers sampled for each prompt by default; 0: it samples none, and takes neither rollout nor reward."""
    min_samples: int = 0
    """The fewest answers to a prompt that its loss can compare."""
    has_value: bool = False
    """A value adapter is trained beside the policy."""
    writes_text: bool = True
    """What it trains is a language model; False: a scalar head."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The kinds of tables that it reads: of single answers a pair has two."""
        return ("unpaired", "preference") if self.data_format == "unpaired" else (self.data_format,)

    @property
    def takes_reward(self) -> bool:
        """It samples answers, which something has to score."""
        return self.samples > 0


KINDS: dict[str, Kind] = {
    "sft": Kind("Supervised fine-tuning: answers as they are given", "auto", None, 1.0),
    "reward": Kind("A reward model: which of two answers is better", "preference", RewardLoss, 1.0, writes_text=False),
    "dpo": Kind("Direct preference optimization: pairs against a reference", "preference", DPOLoss, 0.1, "always"),
    "orpo": Kind("Odds ratio preference optimization: pairs, no reference", "preference", ORPOLoss, 0.1),
    "simpo": Kind("Simple preference optimization: pairs by length, no reference", "preference", SimPOLoss, 0.1),
    "kto": Kind("Kahneman-Tversky optimization: single answers, good or bad", "unpaired", KTOLoss, 0.1, "always"),
    "grpo": Kind(
        "Group relative policy optimization: sampled answers against each other", "prompts", GRPOLoss, 0.1, "by beta",
        samples=8, min_samples=2,
    ),
    "rloo": Kind(
        "REINFORCE leave-one-out: sampled answers, the others as baseline", "prompts", RLOOLoss, 0.1, "by beta",
        samples=4, min_samples=2,
    ),
    "ppo": Kind(
        "Proximal policy optimization: sampled answers, a value for every token", "prompts", PPOLoss, 0.1, "by beta",
        samples=1, min_samples=1, has_value=True,
    ),
}  # fmt: skip

if TYPE_CHECKING:
    KindName: TypeAlias = str
else:  # pydantic reads the names from the table
    KindName = Literal[tuple(KINDS)]


def default_lr(kind: str, method: Method) -> float:
    """The learning rate of a stage that names none: the method's own by the factor of the kind."""
    return float(f"{method.training_defaults().lr * KINDS[kind].lr_factor:.6g}")
