"""Names of other libraries in stages of every kind: what is advised is there to be written, in this kind."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.align.config.foreign_keys import ADVICE
from kitout.align.config.kind_advice import SETTING
from kitout.align.config.kinds import KINDS
from kitout.align.config.load import load_align
from kitout.align.config.schema import KIND_ADVICE
from kitout.align.config.unfit_settings import unfit_settings
from kitout.errors import ConfigError
from kitout.train.config.foreign_keys import ADVICE as OF_RUNS

DATA: dict[str, Any] = {"model": "m", "data": "d"}


def stage_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, "data": "d", **({"reward": "gym:chain_sum"} if KINDS[kind].takes_reward else {})}


def error(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as found:
        load_align(values)
    return str(found.value).removeprefix("the run's config: ")


@pytest.mark.parametrize("kind", KINDS)
def test_every_advised_setting_is_one_of_the_kind(kind: str) -> None:
    advice = KIND_ADVICE.of(kind)
    assert {*ADVICE, *OF_RUNS} <= advice.keys()
    for key, text in advice.items():
        assert text.startswith(("write ", "leave it out: ")), key
        setting = SETTING.match(text)
        if setting is None or setting[1].startswith("method."):
            continue
        assert setting[1] in KIND_ADVICE.settings_of(kind), (key, text)
        assert setting[1] not in unfit_settings(kind), (key, text)


@pytest.mark.parametrize("kind", KINDS)
def test_an_advised_setting_can_be_written(kind: str) -> None:
    """Not only in the list of names: the config itself knows it. Its value may be wrong."""
    advised = {found[1] for text in KIND_ADVICE.of(kind).values() if (found := SETTING.match(text)) is not None}
    for setting in sorted(advised - {"stages"}):
        section, _, key = setting.rpartition(".")
        if not section or section.startswith(("method", "output", "model", "data.train")):
            continue
        assert "there is no such setting" not in error(DATA | stage_of(kind) | {section: {key: [[]]}}), setting


@pytest.mark.parametrize(
    ("kind", "key", "advice"),
    [
        ("dpo", "rpo_alpha", "leave it out: it is loss.cpo_alpha of simpo, and a stage of kind dpo has none"),
        ("simpo", "rpo_alpha", "write loss.cpo_alpha"),
        ("dpo", "num_generations", "leave it out: it is rollout.samples of grpo, rloo, ppo, and a stage of kind dpo"),
        ("grpo", "per_device_train_batch_size", "write rollout.prompts"),
        ("dpo", "per_device_train_batch_size", "write train.batch_size"),
        ("sft", "max_new_tokens", "write evaluate.max_new_tokens"),
        ("grpo", "max_new_tokens", "write rollout.max_new_tokens"),
        ("reward", "max_new_tokens", "leave it out: "),
        ("kto", "sample_packing", "leave it out: an answer is scored in a row of its own"),
        ("sft", "sample_packing", "write train.packing"),
        ("ppo", "gamma", "write loss.gamma"),
        ("orpo", "gamma", "leave it out: it is loss.gamma of simpo, ppo"),
        ("dpo", "lora_model_dir", "write from"),
        ("dpo", "task_type", "write kind"),
        ("dpo", "clip_high", "leave it out: it is loss.clip_high of grpo"),
    ],
)
def test_the_advice_is_that_of_the_kind(kind: str, key: str, advice: str) -> None:
    one = stage_of(kind)
    assert f"{key}: there is no such setting; {advice}" in error({"model": "m", **one, key: 1})
    in_a_file = error({"model": "m", "stages": [{"kind": "sft", "data": "d", "name": "first"}, {**one, key: 1}]})
    written = advice.replace("write ", "write stages.1.")
    assert f"stages.1.{key}: there is no such setting; {written}" in in_a_file
    if f"loss.{key}" not in KIND_ADVICE.settings_of(kind) and KINDS[kind].loss is not None:
        assert f"loss.{key}: there is no such setting; {advice}" in error({"model": "m", **one, "loss": {key: 1}})


def test_beside_the_stages_the_first_that_has_it_is_named() -> None:
    values = {"model": "m", "stages": [stage_of("sft"), stage_of("dpo"), stage_of("grpo")]}
    for key, advice in (
        ("beta", "write stages.1.loss.beta"),
        ("num_generations", "write stages.2.rollout.samples"),
        ("learning_rate", "write stages.0.train.lr"),
        ("output_dir", "write output.folder"),
        ("vf_coef", "leave it out: it is loss.value_coefficient of ppo, and a stage of kind sft has none"),
    ):
        found = KIND_ADVICE.within(values)(key)[key.replace("_", "")]
        assert found == advice
    assert "num_generations: there is no such setting; write stages.2.rollout.samples" in error(
        values | {"num_generations": 4}
    )
    assert KIND_ADVICE.within({})("beta")["beta"] == "write loss.beta"
