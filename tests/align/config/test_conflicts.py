"""What stages say of each other and cannot mean: every error at once, each with the line to write."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.align.config.conflicts import find_remarks
from kitout.align.config.kinds import KINDS
from kitout.align.config.load import load_align
from kitout.align.config.unfit_settings import unfit_settings
from kitout.errors import ConfigError

SFT: dict[str, Any] = {"kind": "sft", "data": "d"}
REWARD: dict[str, Any] = {"kind": "reward", "data": "p", "from": "sft"}
DPO: dict[str, Any] = {"kind": "dpo", "data": "p"}
PPO: dict[str, Any] = {"kind": "ppo", "data": "q", "from": "sft", "reward": "reward"}
GRPO: dict[str, Any] = {"kind": "grpo", "data": "gym:chain_sum", "reward": "gym:chain_sum"}


def errors(*stages: dict[str, Any], **top: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_align({"model": "m", "stages": list(stages)} | top)
    head, *listed = str(error.value).split("\n  - ")
    return listed or [head.removeprefix("the run's config: ")]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([SFT, SFT], "stages.1.name=sft: a stage before it has that name: write stages.1.name=sft-2"),
        (
            [SFT | {"from": "sft"}],
            "stages.0.from=sft: a stage cannot take what it trains itself: name a stage before it (none)",
        ),
        ([DPO | {"from": "sft"}, SFT], "stages.0.from=sft: sft is trained after dpo: write its stage before this one"),
        (
            [SFT | {"from": "dpo"}, DPO | {"from": "sft"}],
            "stages.0.from=dpo: dpo needs sft itself: a circle; leave one of the two out",
        ),
        (
            [SFT, REWARD, DPO | {"from": "reward"}],
            (
                "stages.2.from=reward: a reward adapter has a scalar head and writes no text, dpo trains answers: "
                "write stages.2.from=sft"
            ),
        ),
        (
            [SFT, DPO | {"reward": "x"}],
            "stages.1.reward: a stage of kind dpo takes none (grpo, rloo, ppo do): leave it out",
        ),
        (
            [SFT, REWARD, PPO | {"reward": None}],
            "stages.2.reward: a ppo stage needs what scores its answers: write stages.2.reward=reward",
        ),
        (
            [GRPO | {"reward": []}],
            "stages.0.reward: a grpo stage needs what scores its answers: write stages.0.reward=gym:chain_sum",
        ),
        (
            [GRPO | {"data": "q", "reward": None}],
            (
                "stages.0.reward: a grpo stage needs what scores its answers: a stage of kind reward before it, "
                "its folder, module:function or gym:NAME"
            ),
        ),
        ([SFT, PPO, REWARD], "stages.1.reward=reward: reward is trained after ppo: write its stage before this one"),
        (
            [SFT, PPO | {"reward": "ppo"}],
            "stages.1.reward=ppo: a stage cannot take what it trains itself: name a stage before it (sft)",
        ),
        (
            [SFT, PPO | {"reward": "sft"}],
            (
                "stages.1.reward=sft: is a stage of kind sft, whose adapter scores nothing: name a stage of kind "
                "reward before it, its folder, module:function or gym:NAME"
            ),
        ),
        (
            [SFT, PPO | {"reward": {"a:b": 0}}],
            "stages.1.reward=a:b: a weight of 0 counts nothing: leave it out, or write another weight",
        ),
        (
            [SFT, PPO | {"reward": ["a:b", "a:b"]}],
            "stages.1.reward=a:b: is there twice: write one with the sum of both weights",
        ),
        (
            [GRPO | {"data": ["gym:chain_sum", "gym:gcd#5"]}],
            "stages.0.reward: it has no source for the questions of gcd: write reward=[gym:chain_sum, gym:gcd#5]",
        ),
        (
            [GRPO | {"data": ["gym:gcd", "gym:gcd:min_value=3"], "reward": ["gym:gcd", "gym:gcd:min_value=3"]}],
            (
                "stages.0.reward=gym:gcd:min_value=3: gym:gcd judges all answers to questions of that task already: "
                "leave one of both out"
            ),
        ),
        (
            [GRPO | {"reward": "gym:x"}],
            (
                "stages.0.reward=gym:x: it scores answers to its own questions, and the data is gym:chain_sum: "
                "write reward=gym:chain_sum"
            ),
        ),
        (
            [GRPO | {"rollout": {"samples": 1}}],
            (
                "stages.0.rollout.samples=1: grpo compares the answers to one prompt with each other, and one "
                "alone teaches nothing: write stages.0.rollout.samples=8"
            ),
        ),
        (
            [GRPO | {"kind": "rloo", "rollout": {"samples": 1}}],
            (
                "stages.0.rollout.samples=1: rloo compares the answers to one prompt with each other, and one "
                "alone teaches nothing: write stages.0.rollout.samples=4"
            ),
        ),
        (
            [SFT, REWARD, PPO | {"loss": {"minibatches": 3}, "rollout": {"samples": 2}}],
            (
                "stages.2.loss.minibatches=3 does not divide the 16 answers of a step (rollout.prompts=8 x "
                "rollout.samples=2): write stages.2.loss.minibatches=2"
            ),
        ),
        (
            [SFT, REWARD, PPO | {"loss": {"kl_target": 6, "beta": 0}}],
            (
                "stages.2.loss.kl_target=6 steers loss.beta by factors, and beta=0 turns the reference off: write "
                "stages.2.loss.beta=0.05, or leave kl_target out"
            ),
        ),
        (
            [DPO | {"data": {"train": {"path": "p", "format": "chat"}}}],
            (
                "stages.0.data.train.0.format=chat: a dpo stage reads the format preference or raw_preference: leave "
                "it out"
            ),
        ),
        (
            [DPO | {"data": "gym:chain_sum"}],
            (
                "stages.0.data.train.0.path=gym:chain_sum: it has questions and no answers to compare: a dpo stage "
                "reads the format preference"
            ),
        ),
        (
            [GRPO | {"data": {"train": "q", "test": "gym:chain_sum"}, "reward": "m:f"}],
            (
                "stages.0.data.test=gym:chain_sum: what is held out is split off the prompts of data.train: write a "
                "number, stages.0.data.test=200"
            ),
        ),
        (
            [SFT, GRPO | {"name": "reference", "from": "sft"}],
            (
                "stages.1.name=reference: the stage itself has another adapter of that name beside the one that it "
                "trains: write stages.1.name=grpo-reference"
            ),
        ),
        (
            [SFT, DPO | {"from": "sft", "method": "IA3"}],
            "stages.1.method={'name': 'IA3'}: it starts from sft, whose method is {'name': 'LoRA'}: leave it out",
        ),
        (
            [GRPO | {"method": {"name": "LoRA", "dropout": 0.1}}],
            (
                "stages.0.method.dropout=0.1: with dropout a policy that has not changed gives an answer another "
                "probability each time: write stages.0.method.dropout=0"
            ),
        ),
        (
            [SFT, REWARD | {"from": None, "method": {"name": "LoRA", "dropout": 0.1}}, PPO],
            (
                "stages.1.method.dropout=0.1: with dropout the value adapter of ppo starts from reward, and has "
                "another score each time: write stages.1.method.dropout=0"
            ),
        ),
        (
            [GRPO | {"train": {"micro_batch_size": 99}}],
            "train.micro_batch_size=99 is more than the rollout.prompts=8 x rollout.samples=8 answers it is a part of",
        ),
        (
            [SFT | {"train": {"micro_batch_size": 99}}, DPO],
            "stage sft: train.micro_batch_size=99 is more than the train.batch_size=16 it is a part of",
        ),
        (
            [SFT | {"train": {"seeds": [1, 2]}}, DPO | {"from": "sft"}],
            (
                "stages.0.train.seeds: dpo takes one adapter of sft, and seeds make several: write stages.0.train.seed,"
                " and run the file once more with another output.folder for each seed"
            ),
        ),
    ],
)
def test_a_conflict_has_the_line_to_write(stages: list[dict[str, Any]], message: str) -> None:
    values = [{key: value for key, value in stage.items() if value is not None} for stage in stages]
    assert errors(*values) == [message]


UNFIT: dict[str, Any] = {
    "train.from": "x", "train.seeds": [1, 2], "train.packing": True, "train.fsdp": True, "train.head": "batchnorm",
    "train.trunk": "auto", "train.trunk_bytes": 9,
    "train.compile": "blocks", "train.pad_to": [8], "train.batch_size": 3, "train.group_by_length": False,
    "data.labels": ["a", "b"], "data.src_lang": "x", "data.tgt_lang": "x", "data.image_size": 9,
    "data.augment": {"rotate": 3},
    "data.streaming": True, "data.train_on": "all", "evaluate.max_new_tokens": 7, "evaluate.generate_examples": 3,
    "evaluate.forgetting": "quick", "evaluate.prove_merge": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_has_not_is_refused_and_nothing_else(kind: str) -> None:
    unfit = unfit_settings(kind)
    assert set(unfit) <= set(UNFIT)
    for setting, value in UNFIT.items():
        section, name = setting.split(".")
        stage = {"kind": kind, "data": {"train": "p"}, "train": {"steps": 5}}
        stage |= {"reward": "a:b"} if KINDS[kind].takes_reward else {}
        stage[section] = {**stage.get(section, {}), name: value}
        if setting in unfit:
            found = [one for one in errors(stage) if one.startswith(f"stages.0.{setting}: ")]
            assert len(found) == 1, setting
            assert "leave it out" in found[0] or "write stages.0." in found[0]
        else:
            load_align({"model": "m", "stages": [stage]})


def test_every_conflict_is_reported_at_once() -> None:
    ppo = PPO | {"loss": {"minibatches": 3}, "train": {"packing": True}, "reward": None, "from": "ppo"}
    assert len(errors(SFT, SFT, {k: v for k, v in ppo.items() if v is not None})) == 5


def test_remarks() -> None:
    config = load_align({"model": "m", **GRPO, "rollout": {"top_k": 50}})
    assert list(find_remarks(config)) == [
        "loss.beta=0: the reference is off, no KL is computed",
        (
            "rollout: answers are sampled from a part of the distribution that is trained, which biases "
            "their ratios: top_p=1 and top_k=0 sample from all of it"
        ),
    ]
    assert list(find_remarks(load_align({"model": "m", **GRPO, "loss": {"beta": 0.04}}))) == []


def test_adapters_that_no_stage_is_made_of() -> None:
    adapters = {"name": "m", "adapters": {"a": "x", "b": "y"}}
    mixture = {"name": "Mixture", "of": ["a", "b"]}
    (found,) = errors(SFT, DPO, model=adapters)
    assert found.startswith("model.adapters names a, b, and no method is made of it")
    load_align({"model": adapters, "stages": [SFT | {"method": mixture}, DPO]})
