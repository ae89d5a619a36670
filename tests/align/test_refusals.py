"""What a stage cannot do is refused before its first step, with the line to write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from align.test_run import data_of, stage
from kitout import LoRA, PromptTuning
from kitout.align import run as stages
from kitout.align.config.load import load_align
from kitout.align.config.schema import AlignConfig
from kitout.align.scalar_head import head_path, scalar_head
from kitout.errors import ConfigError, RewardError
from tiny_models import jsonl, tokenizer
from train.fixtures import add

pytest.importorskip("accelerate")
POSITIONS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of positions, and adapters on it."""
    folder = tmp_path_factory.mktemp("refusals")
    fast = tokenizer()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_embd=32, n_layer=1, n_head=2, n_positions=POSITIONS, eos_token_id=5, bos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    kit = kitout.attach(model)
    add(kit, "dropout", LoRA(rank=2, dropout=0.1))
    for i, (name, method) in enumerate({"taste": LoRA(rank=2, dropout=0.2), "long": PromptTuning(length=20)}.items()):
        add(kit, name, method, {head_path(kit): scalar_head(kit, i)})
    for name in kit.names:
        kit.save(name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "error"),
    [
        ("grpo", {"from": "dropout"}, ("from={}/dropout: its method has dropout=0.1, with which it gives an answer "
         "another value each time: train it with method.dropout=0")),
        ("ppo", {"reward": "taste"}, ("reward={}/taste: its method has dropout=0.2, with which it gives an answer "
         "another value each time: train it with method.dropout=0")),
        ("grpo", {"rollout": {"max_new_tokens": 62}}, ("grpo: the model has 64 positions, 64 tokens a text, and an "
         "answer of up to 62 leaves 2 for its prompt: write fewer new tokens, rollout.max_new_tokens=32")),
        ("rloo", {"reward": "long", "rollout": {"max_new_tokens": 40}}, "reward-0: prompt number "),
        ("grpo", {"rollout": {"samples": 1}}, "rollout.samples=1: grpo compares"),
        ("dpo", {"train": {"packing": True}}, "train.packing: an answer is scored in a row of its own: leave it out"),
        ("ppo", {"method": {"name": "LoRA", "dropout": 0.1}}, "write method.dropout=0"),
    ],
)  # fmt: skip
def test_it_is_refused(kind: str, settings: dict[str, Any], error: str, folder: Path, tmp_path: Path) -> None:
    named = {key: str(folder / value) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(ConfigError, match=re.escape(error.format(folder))):
        stage(kind, folder / "model", data_of(kind, tmp_path), tmp_path / "run", **named)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wrong_sources_of_a_later_stage_stop_before_the_first(folder: Path, tmp_path: Path) -> None:
    """All together, and not when the first has trained for hours."""
    sft = {"kind": "sft", "data": str(jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}] * 9))}
    prompts = str(jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i}"} for i in range(9)]))
    function = {"kind": "rloo", "data": prompts, "from": "sft", "reward": "align.test_run:count_leters"}
    wrong = {"kind": "grpo", "data": prompts, "from": "sft", "reward": {"align.test_run:count_word": 1}}
    with pytest.raises(RewardError, match="2 errors") as found:
        kitout.align(
            {"model": str(folder / "model"), "output": str(tmp_path / "runs"), "stages": [sft, function, wrong]},
            log=lambda _: None,
        )
    assert "has no function 'count_leters'; did you mean 'count_letters'?" in str(found.value)
    assert "has no function 'count_word'" in str(found.value)
    assert not (tmp_path / "runs").exists()


def test_a_module_of_a_later_stage_may_read_what_a_stage_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is imported, which is tried before any stage ran."""
    monkeypatch.chdir(tmp_path)
    for name, line in (("reads_results", "open('runs/sft/results.json')"), ("is_wrong", "1 / 0")):
        function = "def score(prompts, answers, rows): return [1.0] * len(answers)"
        (tmp_path / f"{name}.py").write_text(f"{line}\n{function}\n", encoding="utf-8")

    def config(*stages_: dict[str, Any]) -> AlignConfig:
        return load_align({"model": "m", "output": str(tmp_path / "runs"), "stages": list(stages_)})

    sft = {"kind": "sft", "data": "d.jsonl"}
    reads, wrong = (
        {"kind": "grpo", "data": "p.jsonl", "reward": f"{name}:score"} for name in ("reads_results", "is_wrong")
    )
    stages.check_sources(config(sft, reads))
    with pytest.raises(RewardError, match="importing reads_results raised FileNotFoundError"):
        stages.check_sources(config(reads))
    with pytest.raises(RewardError, match="importing is_wrong raised ZeroDivisionError"):
        stages.check_sources(config(sft, wrong))


def test_a_reward_with_dropout_that_is_only_asked_is_allowed(folder: Path, tmp_path: Path) -> None:
    settings = {"reward": str(folder / "taste"), "train": {"steps": 1, "lr": 1e-3}}
    stage("grpo", folder / "model", data_of("grpo", tmp_path), tmp_path / "run", **settings)


def test_prompts_leave_room_for_answers_in_a_table_of_positions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt and answer are longer than the table, so the front of the prompts is cut, as the pre-flight says."""
    data = jsonl(tmp_path / "long.jsonl", [{"prompt": f"{i} " + "a b c d e f g h " * 3} for i in range(20)])
    settings = {"rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 30}, "train": {"steps": 1, "lr": 1e-3}}
    stage("grpo", folder / "model", data, tmp_path / "run", **settings)
    assert (tmp_path / "run" / "results.json").is_file()
    page = capsys.readouterr().out
    assert "the model has 64 positions" in page
    assert "truncation cuts the start of the context of 6 of 6 examples" in " ".join(page.split())


def test_answers_are_sampled_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.distributed, "world_size", lambda: 2)
    config: Any = type("Config", (), {"kind": "ppo"})
    with pytest.raises(ConfigError, match="answers are sampled by one process, found 2: start it without torchrun"):
        stages.check_one_process(config)
