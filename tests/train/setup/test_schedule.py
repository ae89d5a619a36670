"""How long a run is where its config does not say: enough steps for the method, by the data, within an hour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout import IA3, LoRA
from kitout.train.config.load import load
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.batch_plan import num_steps
from kitout.train.loop.jobs import Job
from kitout.train.setup import schedule
from kitout.train.setup.schedule import choose_schedule, fit_to_time, warn_of_few_steps
from tiny_models import encoder, jsonl, reviews


@pytest.mark.parametrize("num_examples", [20, 51, 136, 255, 340, 1000, 1500, 5000, 100_000])
@pytest.mark.parametrize("method", [LoRA(), IA3()])
def test_the_data_decide_epochs_and_batch(num_examples: int, method: Any) -> None:
    chosen, needed = choose_schedule(num_examples, TrainConfig(), method), method.training_defaults().min_steps
    epochs = chosen.num_steps * chosen.batch_size / num_examples
    assert epochs <= schedule.MAX_EPOCHS + 0.1
    assert chosen.num_steps >= 0.95 * min(needed, num_steps(num_examples, 4, schedule.MAX_EPOCHS))
    assert "chosen by the data" in chosen.reason
    if num_examples >= 16 * needed:  # as ever: once, in batches of 16
        assert (chosen.num_steps, chosen.batch_size) == (num_steps(num_examples, 16, 1), 16)
    given = choose_schedule(num_examples, TrainConfig(batch_size=32), method)
    assert given.batch_size == 32


@pytest.mark.parametrize("settings", [{"steps": 7}, {"epochs": 0.5}, {"epochs": 2.0, "batch_size": 8}])
def test_what_is_set_is_never_changed(settings: dict[str, Any]) -> None:
    chosen = choose_schedule(400, TrainConfig(**settings), LoRA())
    batch_size = settings.get("batch_size", 16)
    assert chosen.batch_size == batch_size
    assert chosen.num_steps == settings.get("steps", num_steps(400, batch_size, settings.get("epochs", 1.0)))
    assert chosen.epoch_steps is None
    job = _job(chosen)
    assert fit_to_time([job], [chosen], 1e9)[0] == [job]


def _job(chosen: schedule.Schedule) -> Job:
    batches = [[0] * chosen.batch_size] * chosen.num_steps
    return Job("a", None, [0], batches, chosen.train)  # type: ignore[arg-type]


def test_a_chosen_length_takes_an_hour_or_one_epoch() -> None:
    chosen = choose_schedule(255, TrainConfig(), LoRA())
    for seconds, steps in ((60.0, chosen.num_steps), (2 * schedule.MAX_SECONDS, chosen.num_steps // 2), (1e6, 32)):
        (job,), (cut,), after = fit_to_time([_job(chosen)], [chosen], seconds)
        assert len(job.batches) == cut.num_steps == job.settings.steps == steps
        assert after == pytest.approx(seconds * steps / chosen.num_steps)
        assert ("cut to" in cut.reason) == (steps < chosen.num_steps)


def test_few_steps_are_warned_of() -> None:
    assert warn_of_few_steps("a", choose_schedule(400, TrainConfig(steps=50), LoRA())) == []
    (warning,) = warn_of_few_steps("a", choose_schedule(60, TrainConfig(epochs=1.0), LoRA()))
    assert "4 optimizer steps" in warning
    assert "leave train.epochs" in warning


def test_the_preflight_says_what_was_chosen(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "train.jsonl", reviews(80))
    settings = {"model": {"name": str(encoder(tmp_path / "m")), "dtype": "float32"}, "data": str(data)}
    for name, train, steps in (("chosen", {}, 100), ("set", {"epochs": 1.0}, 4)):
        result = kitout.train(settings, train=train, output={"folder": str(tmp_path / name)}, dry_run=True)
        page = json.loads((result.folder / "preflight.json").read_text())
        assert page["settings"]["schedule"].startswith(f"{page['steps']:,} steps of")
        assert (page["steps"] >= steps) if not train else (page["steps"] <= 5)
        assert any("optimizer steps are few" in warning for warning in page["warnings"]) == bool(train)
    assert load(load({"model": "m", "data": "d"}).to_dict()).train == TrainConfig()
