"""Whole stages on a tiny model, every kind from a file to a tested adapter; chains of stages; resumes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

import kitout
from kitout import IA3, LoRA
from kitout.align import reinforce, rounds
from kitout.align.config.kinds import KINDS, default_lr
from kitout.align.measure import prompts
from kitout.align.rollout import SamplingSettings
from kitout.errors import ConfigError
from kitout.train.metrics_log import read_metrics
from tiny_models import decoder, jsonl, tokenizer
from train.test_run import assert_portable

pytest.importorskip("accelerate")

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "good", "bad"]
SMALL = {"batch_size": 4, "steps": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("models") / "decoder")


def encoder_as_language_model(folder: Path) -> Path:
    """BERT, as AutoModelForCausalLM loads it: its tokens see those after them."""
    fast = tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = BertLMHeadModel(BertConfig(vocab_size=len(fast), pad_token_id=0, max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def pairs(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """The chosen answer says good, the rejected one bad."""
    rng = random.Random(seed)
    return [
        {"prompt": f"{i} {' '.join(rng.choices(WORDS, k=4))}", "chosen": "good", "rejected": "bad"}
        for i in range(number)
    ]


def data_of(kind: str, folder: Path) -> Path:
    rows = pairs(40)
    if kind == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for i, row in enumerate(rows)
            for side in ("chosen", "rejected")
            if i % 2 == (side == "chosen")
        ]
    if kind in ("grpo", "rloo", "ppo"):
        rows = [{"prompt": row["prompt"], "answer": "good"} for row in rows]
    if kind == "sft":
        rows = [{"instruction": row["prompt"], "response": "good"} for row in rows]
    return jsonl(folder / f"{kind}.jsonl", rows)


def count_letters(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
    """A reward that every answer gets: the share of the letter e."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def stage(kind: str, model: Path, data: Path, out: Path, split: dict[str, Any] | None = None, **more: Any) -> Any:
    lines: list[str] = []
    settings: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": split or {"train": str(data), "validation": 6, "test": 8},
        "train": SMALL, "output": {"folder": str(out)}, "evaluate": {"show_examples": 2},
    }  # fmt: skip
    if kind in ("grpo", "rloo", "ppo"):
        settings |= {
            "reward": "align.test_run:count_letters", "rollout": {"prompts": 2, "max_new_tokens": 6},
            "train": {"steps": 4 if kind != "ppo" else 2, "lr": 1e-2},
        }  # fmt: skip
    result = kitout.align(stage=kind, log=lines.append, **(settings | more))
    return result, "\n".join(lines)


def assert_pages(kind: str, run: Path, results: dict[str, Any], printed: str) -> None:
    """Report, card, pictures and the terminal say what the stage was and how it went, each kind its own way."""
    report, card = (file.read_text(encoding="utf-8") for file in (run / "report.html", run / "adapter" / "README.md"))
    title = KINDS[kind].title
    for page in (report, card):
        assert title in page
    assert "Class by class" not in report + printed
    assert ("kitout align ppo --model" in printed) == (kind == "reward")
    assert ("kitout chat" in printed) == (kind != "reward")
    assert results["align"]["alarms"] == [line.removeprefix("alarm: ") for line in printed.splitlines()
                                          if line.startswith("alarm: ")][: len(results["align"]["alarms"])]  # fmt: skip
    is_sampled = KINDS[kind].takes_reward
    shown = "Rounds of sampled answers" if is_sampled else "The reward on held-out answers"
    for text in (report, card, printed):
        assert shown in text
    assert (run / ("training.png" if is_sampled else "reward.png")).is_file()
    assert "reference" not in results["align"] or KINDS[kind].reference != "never"
    if is_sampled:
        assert "Answers over time" in report
        assert "align.test_run:count_letters" in card
        for row in read_metrics(run / "metrics.jsonl"):
            assert "loss" not in row or row["reward_low"] <= row["reward"] <= row["reward_high"]
    else:
        scores = results["align"]["held_out"]["scores"]
        headline = results["comparisons"][kind][0]["name"]
        assert headline in scores
        assert {"ece"} < scores.keys()
        assert all(one["low"] <= one["value"] <= one["high"] for one in scores.values())
        if kind == "reward":
            assert scores[headline] == results["comparisons"][kind][0]["tuned"]


@pytest.mark.parametrize("kind", ["reward", "dpo", "orpo", "simpo", "kto", "grpo", "rloo", "ppo"])
def test_every_kind_trains_and_is_measured(kind: str, model: Path, tmp_path: Path) -> None:
    result, lines = stage(kind, model, data_of(kind, tmp_path), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["align"]["kind"] == kind
    assert_pages(kind, tmp_path / "run", results, lines)
    assert_portable(tmp_path / "run" / "adapter", tmp_path, model)
    assert result.comparisons
    assert all(
        torch.isfinite(value).all() for value in load_file(tmp_path / "run/adapter/adapter.safetensors").values()
    )
    logged = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert logged
    if kind in ("grpo", "rloo", "ppo"):
        completions = read_metrics(tmp_path / "run" / "completions.jsonl")
        page = (tmp_path / "run" / "preflight.txt").read_text(encoding="utf-8")
        assert "rounds of 2 prompts with" in page
        assert re.search(r" answers a step, at most \d+ in one forward; learning rate", page)
        assert completions
        assert {"prompt", "completion", "rewards", "total", "tokens", "ended"} <= completions[0].keys()
        assert all("reward" in row for row in logged)
    again, _ = stage(kind, model, data_of(kind, tmp_path), tmp_path / "run")  # a finished one is shown
    assert again.figures["align"]["kind"] == kind


def test_a_reward_model_learns_and_ppo_starts_its_value_from_it(model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = {kind: str(data_of(kind, tmp_path)) for kind in ("sft", "reward", "ppo", "dpo")}
    held_out = {"validation": 0, "test": 8}
    config = {
        "model": {"name": str(model), "dtype": "float32"}, "output": str(tmp_path / "out"),
        "stages": [
            {"kind": "sft", "data": {"train": folder["sft"], **held_out}, "train": SMALL},
            {"kind": "reward", "data": {"train": folder["reward"], **held_out}, "from": "sft",
             "train": SMALL | {"steps": 30}},
            {"kind": "dpo", "data": {"train": folder["dpo"], **held_out}, "from": "sft", "train": SMALL},
            {"kind": "ppo", "data": {"train": folder["ppo"], **held_out}, "from": "sft", "reward": "reward",
             "train": {"steps": 2, "lr": 1e-3}, "rollout": {"prompts": 2, "max_new_tokens": 5}},
        ],
    }  # fmt: skip
    kitout.align(config, log=lines.append)
    out = tmp_path / "out"
    reward = json.loads((out / "reward" / "results.json").read_text(encoding="utf-8"))
    accuracy = reward["comparisons"]["reward"][0]
    assert accuracy["name"] == "pair_accuracy"
    assert accuracy["tuned"]["value"] == 1.0
    assert json.loads((out / "dpo" / "results.json").read_text(encoding="utf-8"))["align"]["reference"] == "reference"
    assert (out / "ppo" / "value" / "adapter.safetensors").is_file()
    assert_portable(out / "ppo" / "adapter", tmp_path, model)  # a reward's folder is named without its place
    assert (out / "dpo" / "reference.safetensors").is_file()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from tiny_models import both

    with pytest.raises(ConfigError, match="encoder-decoder"):
        stage("dpo", both(tmp_path / "model"), data_of("dpo", tmp_path), tmp_path / "run")


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "reward"])
def test_an_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    model = encoder_as_language_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="BertLMHeadModel is an encoder, whose tokens see those after them"):
        stage(kind, model, data_of(kind, tmp_path), tmp_path / "run")


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_dry_run_needs_no_reference(kind: str, model: Path, tmp_path: Path) -> None:
    kitout.align(
        stage=kind, model=str(model), data=str(data_of(kind, tmp_path)), output=str(tmp_path / "run"), dry_run=True,
        log=lambda _line: None,
    )  # fmt: skip
    assert "estimated cost" in (tmp_path / "run" / "preflight.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "reference.safetensors").exists()


def test_policies_start_from_no_reward_adapter(model: Path, tmp_path: Path) -> None:
    stage("reward", model, data_of("reward", tmp_path), tmp_path / "reward")
    folder = tmp_path / "reward" / "adapter"
    with pytest.raises(ConfigError, match=r"a head of its own.*and writes no text; grpo trains answers: leave from"):
        stage("grpo", model, data_of("grpo", tmp_path), tmp_path / "run", **{"from": str(folder)})
    # a value of another method than the policy's has its own method's rate
    stage(
        "ppo", model, data_of("ppo", tmp_path), tmp_path / "ppo", reward=str(folder), method="IA3",
        train={"steps": 1}, evaluate={"show_examples": 0},
    )  # fmt: skip
    progress = next((tmp_path / "ppo" / "checkpoints").glob("*/progress.json"))
    rates = set(json.loads(progress.read_text(encoding="utf-8"))["scheduler"]["base_lrs"])
    assert {default_lr("ppo", IA3()), default_lr("ppo", LoRA())} <= rates


def judges_only_training(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
    return [float(len(text)) if len(set(map(str, prompts))) == 2 else None for text in completions]


def test_an_evaluation_that_nobody_judges_counts_as_the_worst(model: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="this evaluation counts as the worst"):
        stage("grpo", model, data_of("grpo", tmp_path), tmp_path / "run", reward="align.test_run:judges_only_training")
    logged = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_reward" in row]
    assert logged
    assert all(row["eval_reward"] is None for row in logged)


def test_a_merge_is_proved_on_pairs(model: Path, tmp_path: Path) -> None:
    stage("dpo", model, data_of("dpo", tmp_path), tmp_path / "run", evaluate={"prove_merge": True, "show_examples": 0})
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["merge"]["dpo"]["restored_bit_for_bit"]
    assert results["merge"]["dpo"]["same"] == results["merge"]["dpo"]["asked"] == 8


def test_seeds_are_jobs_of_one_run_as_each_would_be_alone(model: Path, tmp_path: Path) -> None:
    train, few = SMALL | {"steps": 3, "weight_decay": 0.0}, {"evaluate": {"show_examples": 0}}
    data = data_of("dpo", tmp_path)
    result, _ = stage("dpo", model, data, tmp_path / "seeds", train=train | {"seeds": [3, 4]}, **few)
    assert list(result.comparisons) == ["dpo-s3", "dpo-s4"]
    assert result.figures["seeds"]["adapters"] == {"dpo": {"dpo-s3": 3, "dpo-s4": 4}}
    stage("dpo", model, data, tmp_path / "alone", train=train | {"seed": 4}, **few)
    together = load_file(tmp_path / "seeds" / "adapter" / "dpo-s4" / "adapter.safetensors")
    for name, value in load_file(tmp_path / "alone" / "adapter" / "adapter.safetensors").items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5)
    logged = [row for row in read_metrics(tmp_path / "seeds" / "metrics.jsonl") if "eval_loss" in row]
    assert {"eval_dpo-s3/pair_accuracy", "eval_dpo-s4/pair_accuracy", "eval_pair_accuracy"} <= logged[0].keys()


@pytest.mark.parametrize("kind", ["grpo", "orpo", "dpo"])
def test_a_policy_is_compared_with_what_it_started_from(kind: str, model: Path, tmp_path: Path) -> None:
    """Whether the loss has a reference or not: what the stage before it learned is not this stage's."""
    start = tmp_path / "start"
    stage("sft", model, data_of("sft", tmp_path), start, train=SMALL | {"steps": 12})
    small = {"steps": 2, "lr": 1e-7, "weight_decay": 0.0}
    result, _ = stage(
        kind, model, data_of(kind, tmp_path), tmp_path / "run", **{"from": str(start / "adapter")}, train=small
    )
    (comparison,) = result.comparisons.values()
    assert comparison.baseline == "starting adapter"
    assert comparison.changes[0].base.value == comparison.changes[0].tuned.value
    assert ("reference" in result.figures["align"]) == (kind == "dpo")


@pytest.mark.parametrize("kind", ["dpo", "reward", "kto", "grpo"])
def test_rows_about_one_thing_have_one_interval(kind: str, model: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data_of(kind, tmp_path).read_text(encoding="utf-8").splitlines()]
    data = jsonl(tmp_path / "grouped.jsonl", [{**row, "passage": f"p{i // 2}"} for i, row in enumerate(rows)])
    of_groups = {"train": str(data), "validation": 0, "test": 8, "group": "passage"}
    more = {"train": {"steps": 1, **({} if kind == "grpo" else {"batch_size": 4})}}
    stage(kind, model, data, tmp_path / "run", of_groups, **more)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    (changes,) = results["comparisons"].values()
    assert {one[side]["num_groups"] for one in changes for side in ("base", "tuned")} == {4}
    if kind != "grpo":
        assert results["align"]["held_out"]["scores"][changes[0]["name"]]["num_groups"] == 4
    with pytest.raises(ConfigError, match="the 2 test examples are of one group"):
        stage(kind, model, data, tmp_path / "one", of_groups, evaluate={"max_test_examples": 2})


def test_the_pre_flight_says_how_many_answers_run_at_once(model: Path, tmp_path: Path) -> None:
    more = {"train": {"steps": 1, "micro_batch_size": 3}}
    stage("grpo", model, data_of("grpo", tmp_path), tmp_path / "run", **more)
    page = (tmp_path / "run" / "preflight.txt").read_text(encoding="utf-8")
    assert "16 answers a step, at most 3 in one forward; learning rate" in page


def test_the_trial_answers_as_many_prompts_as_a_round(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to one prompt share it, so behind a single one the cost of a step is underestimated."""
    seen: list[Any] = []

    def find_estimate(kit: Any, jobs: Any, *more: Any) -> Any:
        seen.extend(jobs[0].examples)
        return estimate(kit, jobs, *more)

    estimate = reinforce.find_estimate
    monkeypatch.setattr(reinforce, "find_estimate", find_estimate)
    stage("rloo", model, data_of("rloo", tmp_path), tmp_path / "run", train={"steps": 1})
    prompts = [answer.row.input_ids[: answer.row.prompt_length] for answer in seen]
    assert len(set(prompts)) == 2
    assert {len(answer.row.input_ids) - answer.row.prompt_length for answer in seen} == {6}


def test_what_the_template_writes_behind_a_turn_ends_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base's tokenizer may end texts with another token. In rounds, in what is measured, and in a chat afterwards."""
    folder = decoder(tmp_path / "model")
    fast: Any = AutoTokenizer.from_pretrained(folder)
    fast.eos_token = "</s>"
    fast.save_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    base.config.eos_token_id = base.generation_config.eos_token_id = fast.eos_token_id
    base.save_pretrained(folder)
    end = fast.convert_tokens_to_ids("<|im_end|>")
    assert end != fast.eos_token_id
    asked: list[SamplingSettings] = []
    for module in (rounds, prompts):
        sample = module.sample_answers
        monkeypatch.setattr(
            module, "sample_answers", lambda *args, _f=sample, **how: (asked.append(args[3]), _f(*args, **how))[1]
        )
    stage("grpo", folder, data_of("grpo", tmp_path), tmp_path / "run", train={"steps": 1})
    assert len(asked) > 2
    assert {settings.stop_ids for settings in asked} == {(end,)}
    predictor = kitout.load(tmp_path / "run")
    head = predictor.kit.base.get_output_embeddings()
    with torch.no_grad():  # whatever it reads, it writes the end of the turn
        head.weight.zero_()
    head.register_forward_hook(
        lambda _m, _i, logits: logits + torch.nn.functional.one_hot(torch.tensor(end), logits.shape[-1])
    )
    assert predictor.chat("good?", max_new_tokens=20) == ""
    assert predictor.generate("good", max_new_tokens=20) == ""
