"""Pairs, judged answers and prompts in the setup of a run: refused by plain training, counted for alignment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kitout
from kitout.data.encode.answers import PairEncoder, RolloutPromptEncoder, UnpairedEncoder
from kitout.data.statistics import compute_statistics
from kitout.errors import ConfigError, DataError
from kitout.train.config.schema import DataConfig
from kitout.train.objectives.tasks import TASKS, Task
from kitout.train.setup.datasets import load_datasets
from kitout.train.setup.job_datasets import Datasets
from tiny_models import decoder, jsonl, tokenizer

PAIRS = [{"prompt": f"walk {i} ?", "chosen": f"the cat {i} today", "rejected": f"the dog {i} again and again"}
         for i in range(40)]  # fmt: skip
JUDGED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2} for i, row in enumerate(PAIRS)]


def task(kind: str) -> Task:
    encoders = {
        "preference": lambda s: PairEncoder(s.tokenizer, s.max_length, s.chat_template_kwargs, s.dropped),
        "unpaired": lambda s: UnpairedEncoder(s.tokenizer, s.max_length, s.chat_template_kwargs, s.dropped),
        "prompts": lambda s: RolloutPromptEncoder(
            s.tokenizer, s.max_length, 8, s.chat_template_kwargs, "drop", s.dropped
        ),
    }
    kinds = ("unpaired", "preference") if kind == "unpaired" else (kind,)
    return replace(TASKS["causal_lm"], name=kind, kinds=kinds, build_encoder=encoders[kind])


def load(kind: str, *sources: Any, **settings: Any) -> Datasets:
    config = DataConfig.model_validate({"train": sources if len(sources) > 1 else sources[0]} | settings)
    return load_datasets(config, task(kind), tokenizer(), False)


def test_plain_training_refuses_them_before_a_model_is_loaded(tmp_path: Path) -> None:
    model, log = decoder(tmp_path / "model"), list[str]()
    equal = [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}]  # which is not what is wrong
    for name, rows, stage in (("pairs", equal, "dpo"), ("judged", JUDGED, "kto")):
        path = jsonl(tmp_path / f"{name}.jsonl", rows)
        data = {"train": {"path": str(path), "format": "auto" if name == "pairs" else "unpaired"}}
        for streaming in (False, True):
            config = {
                "model": {"name": str(model)},
                "data": data | {"streaming": streaming},
                "output": {"folder": str(tmp_path / "out")},
            }
            with pytest.raises(DataError) as error:
                kitout.train(config | {"train": {"steps": 2}}, log=log.append)
            assert f"kitout align {stage} --model M --data {path} --out DIR" in str(error.value)
            assert "data.train.format=instruction data.train.columns.instruction=prompt" in str(error.value)
    assert not any(line.startswith("loading /") for line in log)


def test_kinds_of_a_task_decide_how_a_table_is_read(tmp_path: Path) -> None:
    pairs, judged = jsonl(tmp_path / "p.jsonl", PAIRS), jsonl(tmp_path / "j.jsonl", JUDGED)
    by_kind = {kind: load(kind, str(pairs)) for kind in ("preference", "unpaired", "prompts")}
    assert [type(one.train[0]).__name__ for one in by_kind.values()] == [
        "EncodedPair", "EncodedUnpaired", "EncodedPrompt"
    ]  # fmt: skip
    assert len(by_kind["unpaired"].train) == 2 * len(by_kind["preference"].train)
    assert by_kind["prompts"].train[0].row == PAIRS[0]
    assert by_kind["preference"].reading_notes[0] == "preference (chosen, rejected, prompt)"
    assert by_kind["prompts"].reading_notes[0] == "prompts (prompt); kept for rewards: chosen, rejected"
    assert all(one.is_chat and one.answers is None and one.majority_accuracy is None for one in by_kind.values())
    assert len({one.digest for one in by_kind.values()}) == 3
    statistics = compute_statistics({"train": load("unpaired", str(judged)).train})
    assert set(statistics.train.label_counts) == {"desirable", "undesirable"}
    with pytest.raises(DataError, match=r"p2\.jsonl has texts to train on .*needed are pairs"):
        load("preference", {"path": str(jsonl(tmp_path / "p2.jsonl", PAIRS)), "format": "completion",
                            "columns": {"completion": "chosen"}})  # fmt: skip


def test_mixtures_bad_rows_and_streams(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", [*PAIRS[:20], {"prompt": "a", "chosen": "b", "rejected": "b"}])
    second = jsonl(tmp_path / "b.jsonl", [row | {"margin": 2} for row in PAIRS[20:]])
    sources = ({"path": str(first), "weight": 2}, {"path": str(second)})
    dataset = load("preference", *sources, bad_rows="skip", validation=0)
    assert dataset.mixture_weights == (2, 1)
    assert [{item.margin for item in dataset.train[r.start : r.stop]} for r in dataset.mixture_ranges] == [{0}, {2}]
    (message,) = dataset.skipped
    assert "a.jsonl line 21: the chosen and the rejected answer are equal" in message
    with pytest.raises(DataError, match=r"line 21: (.|\n)*correct them, or leave them out: data.bad_rows=skip"):
        load("preference", *sources)
    with pytest.raises(ConfigError, match=r"data\.streaming: alignment reads its data whole"):
        load("preference", str(first), streaming=True)


def test_what_does_not_fit_is_counted_by_split(tmp_path: Path) -> None:
    long = [row | {"rejected": "again " * 60} if i % 8 == 0 else row for i, row in enumerate(PAIRS)]
    path = jsonl(tmp_path / "p.jsonl", long)
    dataset = load("preference", str(path), max_length=60, test=0.25)
    assert sum(map(len, dataset.dropped.values())) == 5
    assert dataset.dropped["train"][0].startswith("p.jsonl:")
    num_dropped = {split: len(messages) for split, messages in dataset.dropped.items()}
    statistics = compute_statistics({"train": dataset.train, "test": dataset.test}, num_dropped=num_dropped)
    assert [(split.name, split.num_dropped) for split in statistics.splits] == [
        (name, num_dropped.get(name, 0)) for name in ("train", "test")
    ]
    with pytest.raises(
        ConfigError, match=r"no training example is left of .*; 38 examples do not fit and are left out: q"
    ):
        load("preference", str(jsonl(tmp_path / "q.jsonl", [PAIRS[i] | {"chosen": "the " * 90} for i in range(40)])),
             max_length=60, test=0)  # fmt: skip
    prompts = load("prompts", str(jsonl(tmp_path / "r.jsonl", [*PAIRS, {"prompt": "again " * 60, "answer": "4"}])),
                   max_length=60, test=0, validation=0)  # fmt: skip
    assert [len(messages) for messages in prompts.dropped.values()] == [1]
    assert json.dumps(prompts.train[0].row)
