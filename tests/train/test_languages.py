"""Whole runs of translation: the model starts to write in the language of the targets, and its card says which."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import kitout
import tiny_translators
from kitout.errors import ConfigError
from kitout.train.config.load import load
from kitout.train.setup.prepare import prepare
from tiny_models import jsonl

pytest.importorskip("accelerate")

TARGETS = {"nllb": "deu_Latn", "mbart": "de_DE"}


def rows(number: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    words = ["cat", "dog", "sun", "tree"]
    return [
        {"prompt": " ".join(rng.choices(words, k=4)) + " " + "abcdefghij"[i // 10] + "abcdefghij"[i % 10],
         "completion": " ".join(rng.choices(words, k=3))}
        for i in range(number)
    ]  # fmt: skip


def settings(folder: Path, kind: str, **data: Any) -> dict[str, Any]:
    model = getattr(tiny_translators, kind)(folder / kind)
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(jsonl(folder / "x.jsonl", rows(60))), **data},
        "train": {"steps": 1, "batch_size": 4},
        "evaluate": {"steps": 0, "generate_examples": 1, "max_test_examples": 2, "show_examples": 1},
        "output": {"folder": str(folder / "out")},
    }


@pytest.mark.parametrize("kind", TARGETS)
def test_evaluation_starts_with_the_language_of_the_targets(tmp_path: Path, kind: str) -> None:
    made = settings(tmp_path, kind, tgt_lang=TARGETS[kind])
    code = getattr(tiny_translators, f"{kind}_tokenizer")().convert_tokens_to_ids(TARGETS[kind])
    run = prepare(load(made))
    objective: Any = run.jobs[0].objective
    batch = objective.collate(run.jobs[0].examples[:2], None)
    decoder_ids = batch.inputs["decoder_input_ids"]
    assert int(decoder_ids[0, 1 if kind == "nllb" else 0]) == code  # what the decoder reads before the first word
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    with run.kit.use(run.jobs[0].name):
        out = run.kit.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
    assert int(out[0, 1 if kind == "nllb" else 0]) == code
    kitout.train(made, log=lambda _line: None)
    card = next((tmp_path / "out" / "adapter").rglob("README.md")).read_text()
    assert f"tgt_lang: {TARGETS[kind]}" in card  # `kitout.load` starts with it
    assert "print(p(" in card
    assert "languages" in (tmp_path / "out" / "preflight.txt").read_text()


def test_one_target_language_a_run(tmp_path: Path) -> None:
    made = settings(tmp_path, "nllb")
    data = {"train": made["data"]["train"]}
    jobs = [{"name": code, "data": data | {"tgt_lang": code}} for code in ("deu_Latn", "fra_Latn")]
    with pytest.raises(ConfigError, match=r"write one language .* deu_Latn: deu_Latn, fra_Latn: fra_Latn"):
        prepare(load(made | {"jobs": jobs}))
    with pytest.raises(ConfigError, match="are for objective=seq2seq_lm, not for objective=causal_lm"):
        prepare(load(made | {"objective": "causal_lm", "data": data | {"tgt_lang": "deu_Latn"}}))
