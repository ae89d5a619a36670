"""Histories that raise each alarm, and one that raises none; each once, whatever is resumed."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.align.alarm_display import AlarmDisplay
from kitout.align.alarms import AlarmWatch, find_alarms
from kitout.align.config.schema import AlignConfig, StageRun

GOOD = {"reward": 0.5, "answer_tokens": 30.0, "entropy": 2.0, "kl_to_reference": 1.0, "ended": 0.9,
        "groups_without_spread": 0.2}  # fmt: skip
NAN = float("nan")


def config_of(kind: str = "grpo", **loss: Any) -> StageRun:
    stage = {"kind": kind, "data": {"train": "p.jsonl"}, "reward": "module:function", "loss": loss}
    config = AlignConfig.model_validate({"model": "smollm2-135m", "stages": [stage]})
    return next(iter(config.runs()))


def history(rounds: int = 12, after: int = 6, per_round: int = 1, **changed: Any) -> list[dict[str, Any]]:
    """Good rounds, then others; between them lines of an evaluation."""
    rows: list[dict[str, Any]] = []
    for step in range(1, rounds * per_round + 1):
        is_late = (step - 1) // per_round >= after
        rows += [
            {"step": step, "loss": 0.1, **GOOD, **(changed if is_late else {})},
            {"step": step, "eval_reward": 1.0},
        ]
    return rows


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_a_run_without_trouble_has_no_alarm(kind: str) -> None:
    assert find_alarms(config_of(kind), 1, history()) == []


@pytest.mark.parametrize(
    ("name", "changed", "advice"),
    [
        ("kl", {"kl_to_reference": 40.0}, "raise loss.beta"),
        ("kl", {"kl_to_reference": None, "kl": 40.0}, "raise loss.beta"),
        ("length", {"answer_tokens": 90.0}, "loss.variant=dr_grpo"),
        ("entropy", {"entropy": 0.05}, "lower train.lr"),
        ("spread", {"groups_without_spread": 0.95}, "rollout.samples"),
        ("cut", {"ended": 0.02}, "rollout.max_new_tokens"),
    ],
)
def test_each_trouble_has_its_alarm_once(name: str, changed: dict[str, float], advice: str) -> None:
    (alarm,) = find_alarms(config_of(), 1, history(**changed))
    assert alarm.name == name
    assert 6 < alarm.step <= 12
    assert advice in alarm.text
    assert str(alarm).startswith(f"step {alarm.step}: ")
    (of_a_job,) = find_alarms(config_of(), 1, [
        {key if key in ("step", "reward", "answer_tokens") or "eval" in key else f"x/{key}": value
         for key, value in row.items()} for row in history(**changed)
    ])  # fmt: skip
    assert of_a_job == alarm


def test_the_target_of_kl_is_the_stage_s_own() -> None:
    rows = history(kl_to_reference=10.0)
    assert not find_alarms(config_of("ppo"), 1, rows)
    (alarm,) = find_alarms(config_of("ppo", kl_target=1.0), 1, rows)
    assert "over 3 x 1" in alarm.text
    assert "kl_target=6" not in alarm.text
    (alarm,) = find_alarms(config_of("ppo"), 1, history(kl_to_reference=40.0))
    assert "loss.kl_target=6" in alarm.text


@pytest.mark.parametrize("rows", [
    history(after=11, kl_to_reference=40.0),  # one round alone is luck
    history(rounds=2, after=0, ended=0.0),  # two are few
    history(kl_to_reference=NAN, entropy=NAN),
    [{"step": 1, "eval_reward": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "reward": None}],
    [row | {"answer_tokens": 7.0 if row["step"] > 3 else 1.0} for row in history() if "reward" in row],
])  # fmt: skip
def test_what_is_no_trouble(rows: list[dict[str, Any]]) -> None:
    assert find_alarms(config_of(), 1, rows) == []


def test_steps_on_the_same_answers_are_one_round() -> None:
    rows = history(rounds=8, after=7, per_round=4, ended=0.0)
    assert not find_alarms(config_of("ppo"), 4, rows)
    assert find_alarms(config_of("ppo"), 4, history(rounds=12, after=6, per_round=4, ended=0.0))


def test_they_are_printed_as_they_come_and_not_again_after_a_resume() -> None:
    class State:
        is_world_process_zero, global_step = True, 0

    rows, printed, state = history(ended=0.0), list[str](), State()
    display = AlarmDisplay(AlarmWatch(config_of(), 1), printed.append, lambda: rows)
    display.on_train_begin(None, state, None)
    for row in rows:
        state.global_step = row["step"]
        display.on_log(None, state, None, row)
    assert len(printed) == 1
    assert printed[0].startswith("alarm: step ")
    resumed = AlarmDisplay(AlarmWatch(config_of(), 1), printed.append, lambda: rows)
    state.global_step = 12
    resumed.on_train_begin(None, state, None)
    resumed.on_log(None, state, None, {**GOOD, "ended": 0.0})
    assert len(printed) == 1
    assert resumed.watch.raised == find_alarms(config_of(), 1, rows)
