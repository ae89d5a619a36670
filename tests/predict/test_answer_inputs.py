"""A reward adapter after training: scores of answers and pairs, tables of both, and what other verbs say of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kitout
from align.test_run import pairs, stage
from kitout.align.rewards.reward import AnswerBatch
from kitout.align.rewards.reward_model import ModelReward
from kitout.errors import BadRows, ConfigError, DataError, FileError, NotMergeable
from kitout.predict.answer_inputs import answer_format
from kitout.predict.open_input import open_input
from kitout.predict.saved_adapters import check_writes, one_adapter
from kitout.predict.table import TablePredictor
from tiny_models import decoder, jsonl

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    model, data = decoder(folder / "model"), jsonl(folder / "pairs.jsonl", pairs(40))
    stage("reward", model, data, folder / "run", train={"batch_size": 8, "steps": 12, "lr": 1e-2})
    return folder / "run" / "adapter"


@pytest.fixture(scope="module")
def predictor(adapter: Path) -> Any:
    return kitout.load(adapter)


def test_an_answer_has_the_score_that_it_has_as_a_reward(predictor: Any) -> None:
    prompt, answers = "3 a good f", ["good", "bad"]
    items = predictor.preprocessing.texts([{"prompt": prompt, "completion": text} for text in answers])
    rows = [item.rows[0] for item in items]
    batch = AnswerBatch([prompt] * 2, answers, [{}] * 2, rows)
    expected = ModelReward("r", predictor.kit, predictor.loaded[0]).score(batch)
    found = predictor([{"prompt": prompt, "completion": "good"}, (prompt, "bad")])
    assert [one.value for one in found] == pytest.approx(expected, abs=1e-5)
    pair = predictor({"prompt": prompt, "chosen": "good", "rejected": "bad"})
    assert [pair.chosen_score, pair.rejected_score] == pytest.approx(expected, abs=1e-5)
    assert pair.value is None
    assert str(pair).startswith("chosen ")
    messages = {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": "bad"}],
    }
    mixed = predictor([pair_row := {"prompt": prompt, "chosen": "good", "rejected": "bad"}, messages])
    assert mixed[1].value == pytest.approx(expected[1], abs=1e-5)
    assert mixed[0].chosen_score == pytest.approx(predictor(pair_row).chosen_score, abs=1e-5)


@pytest.mark.parametrize("value", ["a text", {"prompt": "a"}, {"completion": "good"}, ("a", "b", "c"), 3])
def test_what_is_no_answer_says_what_to_give(predictor: Any, value: Any) -> None:
    with pytest.raises(BadRows, match="prompt"):
        predictor(value)


def test_an_answer_that_does_not_fit_is_named(predictor: Any) -> None:
    with pytest.raises(BadRows, match="input 2"):
        predictor([("a", "good"), ("a", "good " * 1200)])


def test_tables_of_pairs_and_of_answers(predictor: Any, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "pairs.jsonl", pairs(6, seed=5))
    rows = open_input(str(data), predictor.usage, {}, io.StringIO())
    table = TablePredictor(predictor)
    found = [row for row, _ in table.stream(rows)]
    assert all(row["chosen_score"] > row["rejected_score"] for row in found)
    assert rows.has_references
    single = jsonl(
        tmp_path / "one.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs(6, 5)]
    )
    rows = open_input(str(single), predictor.usage, {}, io.StringIO())
    values = [row["value"] for row, _ in table.stream(rows)]
    assert values == pytest.approx([row["chosen_score"] for row in found], abs=1e-5)
    assert not rows.has_references


def test_the_command_line_predicts_pairs(adapter: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kitout.cli import app

    data = jsonl(tmp_path / "pairs.jsonl", pairs(6, seed=5))
    result = CliRunner().invoke(app, ["predict", str(adapter), str(data), "--out", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 0, result.output
    assert "pair accuracy 100.0 %" in result.output
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0].keys() == {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}


def test_what_is_no_table_is_refused_before_anything_is_loaded(predictor: Any, tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("a\n")
    for source in ("a text", "-", str(text)):
        with pytest.raises(DataError, match="is no table; a reward adapter scores an answer to a prompt"):
            open_input(source, predictor.usage, {}, io.StringIO())


def test_raw_texts_stay_raw(predictor: Any) -> None:
    usage = predictor.usage
    raw = usage.model_copy(update={"text": usage.text.model_copy(update={"format": "completion"})})
    assert answer_format(usage, ["prompt", "chosen", "rejected"]).name == "preference"
    assert answer_format(raw, ["prompt", "chosen", "rejected"]).name == "raw_preference"
    assert answer_format(raw, ["prompt", "chosen"]).name == "raw_unpaired"


def test_other_verbs_say_what_it_is_for(adapter: Path, predictor: Any, tmp_path: Path) -> None:
    from kitout.assess.runner import run
    from kitout.export.exported_adapter import export_adapter
    from kitout.export.merged_folder import write_merged

    with pytest.raises(ConfigError, match=r"kitout predict .* answers\.jsonl"):
        check_writes([one_adapter(adapter)])
    with pytest.raises(ConfigError, match="does not write"):
        predictor.chat("hello")
    with pytest.raises(ConfigError, match="kitout align ppo --reward"):
        run(predictor.kit, None, [str(tmp_path / "x.jsonl")], usages=predictor.usages)
    with pytest.raises(NotMergeable, match="kitout align ppo --reward"):
        write_merged(predictor, tmp_path / "merged")
    with pytest.raises(FileError, match="kitout align ppo --reward"):
        export_adapter(adapter, tmp_path / "peft")
    assert torch.is_grad_enabled()
