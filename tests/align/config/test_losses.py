"""The settings of each kind's loss: their defaults, what they refuse, and what others call them."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.align.config import losses
from kitout.align.config.kinds import KINDS
from kitout.align.config.load import load_align
from kitout.errors import ConfigError
from kitout.train.config.foreign_keys import fold_key

DATA: dict[str, Any] = {"model": "m", "data": "d"}
REWARD = {name: {"reward": "gym:chain_sum"} if kind.takes_reward else {} for name, kind in KINDS.items()}


def error(kind: str, loss: Any) -> str:
    with pytest.raises(ConfigError) as found:
        load_align(DATA | REWARD[kind] | {"kind": kind, "loss": loss})
    return str(found.value).removeprefix("the run's config: ")


def test_defaults() -> None:
    """As papers and TRL have them; a change here changes results."""
    defaults = {
        name: {} if kind.loss is None else kind.loss().model_dump(by_alias=True) for name, kind in KINDS.items()
    }
    assert defaults == {
        "sft": {},
        "reward": {"centering": 0.01},
        "dpo": {"variant": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
        "orpo": {"beta": 0.1},
        "simpo": {"beta": 2.0, "gamma": 1.0, "cpo_alpha": 0.0},
        "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "grpo": {
            "clip": 0.2, "variant": "dapo", "clip_high": None, "beta": 0.0, "scale": "group", "mask_truncated": False,
            "iterations": 1,
        },
        "rloo": {"clip": 0.2, "beta": 0.05},
        "ppo": {
            "clip": 0.2, "value_clip": 0.2, "value_coefficient": 0.1, "gamma": 1.0, "lambda": 0.95, "beta": 0.05,
            "kl_target": None, "kl_horizon": 10_000, "epochs": 4, "minibatches": 1, "whiten_rewards": False,
            "missing_end_penalty": None,
        },
    }  # fmt: skip


def test_dr_grpo_divides_by_nothing_unless_it_says_so() -> None:
    assert losses.GRPOLoss(variant="dr_grpo").scale == "none"
    assert losses.GRPOLoss(variant="dr_grpo", scale="batch").scale == "batch"
    assert losses.GRPOLoss(variant="grpo").scale == "group"


def test_lambda_is_a_word_of_python() -> None:
    assert losses.PPOLoss(lambda_=0.9) == losses.PPOLoss.model_validate({"lambda": 0.9})


@pytest.mark.parametrize(
    ("kind", "loss", "words"),
    [
        ("sft", {"beta": 1}, "loss: a stage of kind sft has no loss to set: leave it out"),
        ("reward", {"centering": -1}, "loss.centering: expected 0 or more, found -1"),
        (
            "reward",
            {"center_rewards_coefficient": 0},
            "loss.center_rewards_coefficient: there is no such setting; write loss.centering",
        ),
        ("dpo", 3, "loss: expected settings (name: value), found 3"),
        ("dpo", {"beta": 0}, "loss.beta: expected more than 0, found 0"),
        ("dpo", {"bta": 0}, "loss.bta: there is no such setting; did you mean 'beta'?"),
        ("dpo", {"variant": "ipoo"}, "loss.variant: expected 'sigmoid', 'ipo' or 'hinge', found 'ipoo'"),
        ("dpo", {"loss_type": "ipo"}, "loss.loss_type: there is no such setting; write loss.variant"),
        ("dpo", {"label_smoothing": 0.5}, "loss.label_smoothing: expected less than 0.5, found 0.5"),
        (
            "dpo",
            {"label_smoothing": 0.1, "variant": "ipo"},
            "loss.label_smoothing: is for variant=sigmoid, not for variant=ipo: leave it out",
        ),
        (
            "dpo",
            {"epsilon": 0.2},
            "loss.epsilon: there is no such setting; leave it out: it is loss.clip of grpo, rloo, ppo, and",
        ),
        ("orpo", {"beta": -1}, "loss.beta: expected more than 0, found -1"),
        ("simpo", {"beta": 0}, "loss.beta: expected more than 0"),
        ("simpo", {"gamma": -1}, "loss.gamma: expected 0 or more"),
        ("simpo", {"cpo_alpha": -1}, "loss.cpo_alpha: expected 0 or more"),
        ("simpo", {"simpo_gamma": 1}, "loss.simpo_gamma: there is no such setting; write loss.gamma"),
        ("kto", {"beta": 0}, "loss.beta: expected more than 0"),
        ("kto", {"desirable_weight": -1}, "loss.desirable_weight: expected 0 or more"),
        ("kto", {"undesirable_weight": -1}, "loss.undesirable_weight: expected 0 or more"),
        ("grpo", {"variant": "dpo"}, "loss.variant: expected 'dapo', 'grpo' or 'dr_grpo'"),
        ("grpo", {"clip": 1}, "loss.clip: expected less than 1, found 1"),
        ("grpo", {"clip_high": 0}, "loss.clip_high: expected more than 0"),
        ("grpo", {"epsilon_high": 0.28}, "loss.epsilon_high: there is no such setting; write loss.clip_high"),
        ("grpo", {"beta": -1}, "loss.beta: expected 0 or more"),
        ("grpo", {"scale": True}, "loss.scale: expected 'group', 'batch' or 'none', found True"),
        ("grpo", {"mask_truncated": 3}, "loss.mask_truncated: expected true or false"),
        ("grpo", {"iterations": 0}, "loss.iterations: expected more than 0"),
        ("rloo", {"beta": -1}, "loss.beta: expected 0 or more"),
        ("rloo", {"clip": 0}, "loss.clip: expected more than 0"),
        ("ppo", {"value_clip": 0}, "loss.value_clip: expected more than 0"),
        ("ppo", {"vf_coef": 0.1}, "loss.vf_coef: there is no such setting; write loss.value_coefficient"),
        ("ppo", {"value_coefficient": -1}, "loss.value_coefficient: expected 0 or more"),
        ("ppo", {"gamma": 1.1}, "loss.gamma: expected 1 or less"),
        ("ppo", {"lambda": 1.1}, "loss.lambda: expected 1 or less"),
        ("ppo", {"lam": 0.9}, "loss.lam: there is no such setting; write loss.lambda"),
        ("ppo", {"beta": -1}, "loss.beta: expected 0 or more"),
        ("ppo", {"kl_target": 0}, "loss.kl_target: expected more than 0"),
        ("ppo", {"kl_horizon": 0}, "loss.kl_horizon: expected more than 0"),
        ("ppo", {"epochs": 0}, "loss.epochs: expected more than 0"),
        ("ppo", {"minibatches": 0}, "loss.minibatches: expected more than 0"),
        ("ppo", {"whiten_rewards": "x"}, "loss.whiten_rewards: expected true or false"),
        ("ppo", {"missing_end_penalty": -1}, "loss.missing_end_penalty: expected 0 or more"),
    ],
)
def test_an_error_names_the_setting_and_what_to_write(kind: str, loss: Any, words: str) -> None:
    assert error(kind, loss).startswith(words)


def test_all_errors_of_a_loss_at_once() -> None:
    assert error("dpo", {"beta": -1, "bta": 1, "variant": "x"}).startswith("3 errors")


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.loss is not None])
def test_every_setting_is_described(kind: str) -> None:
    settings = KINDS[kind].loss
    assert settings is not None
    for name, field in settings.model_fields.items():
        assert field.description, f"{kind}: {name}"


def test_other_names_mean_one_setting_each_and_one_that_exists() -> None:
    folded = [fold_key(name) for names in losses.ELSEWHERE.values() for name in names.split()]
    assert len(folded) == len(set(folded))
    known = {
        field.alias or name
        for kind in KINDS.values()
        if kind.loss is not None
        for name, field in kind.loss.model_fields.items()
    }
    assert {setting.split(" ")[0].removeprefix("loss.") for setting in losses.ELSEWHERE} == known - {"kl_horizon"}
