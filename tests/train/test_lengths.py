"""Whole runs with texts longer than the model reads: cut in every split, shown, and measured; never an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout.errors import ConfigError
from kitout.train.measure import evaluate
from kitout.train.setup import datasets
from tiny_models import jsonl, reviews, tokenizer

pytest.importorskip("accelerate")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = SIZES | {"max_position_embeddings": 32, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
SEQ2SEQ |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 32, "pad_token_id": 0}
SEQ2SEQ |= {"decoder_start_token_id": 3, "eos_token_id": 3, "bos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
# By kind: class, config, settings.
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaModel", "RobertaConfig", BERT | {"pad_token_id": 1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "opt": ("OPTForCausalLM", "OPTConfig", BERT | {"ffn_dim": 48}),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", GPT | {"dff": 48}),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"pad_token_id": 0, "eos_token_id": 3}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"max_position_embeddings": 32}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, (model, config, settings) in BASES.items():
        words = tokenizer(template=False)
        torch.manual_seed(0)
        base = getattr(transformers, model)(getattr(transformers, config)(vocab_size=len(words), **settings))
        folders[name] = tmp_path_factory.mktemp("models") / name
        base.save_pretrained(folders[name])
        words.save_pretrained(folders[name])
    return folders


def rows(number: int, long: bool, kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of about 12 tokens, or far more than 32."""
    some = []
    for one in reviews(number, seed):
        text = f"{one['text']} " * (8 if long else 1)
        answers = {"label": {"text": text, "label": one["label"]}, "tags": {"tokens": text.split()}}
        answers["tags"] |= {"tags": ["W" if word.isdigit() else "O" for word in text.split()]}
        answers["answer"] = {"prompt": text, "completion": " " + one["text"]}
        answers["closed"] = {"prompt": text, "completion": " " + one["label"]}
        some.append(answers[kind])
    return some


def run(base: Path, tmp_path: Path, kind: str, long: dict[str, bool], dry_run: bool = False, **changes: Any) -> Any:
    files = {
        split: str(jsonl(tmp_path / f"{split}.jsonl", rows(16, long.get(split, False), kind, seed)))
        for seed, split in enumerate(("train", "validation", "test"))
    }
    settings = {
        "model": {"name": str(base), "dtype": "float32"}, "data": files | changes.pop("data", {}),
        "train": {"batch_size": 4, "steps": 2, **changes.pop("train", {})}, "output": {"folder": str(tmp_path / "out")},
        "evaluate": {"steps": 2, "generate_examples": 3, **changes.pop("evaluate", {})}, **changes,
    }  # fmt: skip
    return kitout.train(settings, dry_run=dry_run, log=lambda _: None)


def preflight(tmp_path: Path) -> dict[str, Any]:
    page: dict[str, Any] = json.loads((tmp_path / "out" / "preflight.json").read_text())
    return page


# Kind of data, settings, what is shown, the longest example, the split with long texts.
CASES = {
    "bert": ("label", {}, "32 tokens an example: the model has 32 positions", 32, "test"),
    "roberta": ("tags", {}, "30 tokens an example: the model has 30 positions", 30, "train"),
    "gpt2": ("closed", {}, "32 tokens an example: the model has 32 positions", 32, "test"),
    "opt": ("answer", {}, "32 tokens an example: the model has 32 positions", 32, "train"),
    "ctrl": ("answer", {}, "32 tokens an example: the model runs on no more", 32, "test"),
    "bart": ("answer", {}, "32 tokens an example: the model has 32 positions", 45, "test"),
    "bert and a prompt": (
        "label", {"method": {"name": "PromptTuning", "length": 5, "init": "normal"}},
        "27 tokens an example: the model has 32 positions, of which 5 are virtual tokens", 27, "test",
    ),
    "gpt2 and a prefix": (
        "answer", {"method": {"name": "PrefixTuning", "length": 5}},
        "27 tokens an example: the model has 32 positions, of which 5 are virtual tokens", 27, "train",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_texts_longer_than_the_model_reads_are_truncated_in_every_split(
    bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    kind, changes, shown, longest, split = CASES[case]
    # 40 new tokens: prompt, answer and virtual tokens do not fit together either
    result = run(bases[case.split()[0]], tmp_path, kind, {split: True}, evaluate={"max_new_tokens": 40}, **changes)
    assert result.comparisons["adapter"].changes
    page = preflight(tmp_path)
    assert shown in page["settings"]["length"]
    parts = {part["name"]: part for part in page["facts"]["parts"]}
    assert parts[split]["longest"] <= longest
    assert parts[split]["cut"] == 16
    assert parts[split]["longest"] >= longest - 4
    (warning,) = [line for line in page["facts"]["warnings"] if line.startswith(f"{split}: truncation")]
    assert warning.endswith("the model reads no more")


def test_a_length_that_is_asked_for_the_tokenizers_and_the_default(bases: dict[str, Path], tmp_path: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(bases["t5"])
    words.model_max_length = 20
    words.save_pretrained(bases["t5"])
    long = {"train": True, "validation": True, "test": True}
    run(bases["t5"], tmp_path, "answer", long, dry_run=True)
    page = preflight(tmp_path)
    assert page["settings"]["length"] == "at most 20 tokens an example: the tokenizer's model_max_length"
    assert {part["longest"] for part in page["facts"]["parts"]} <= set(range(30, 41))
    (tmp_path / "other").mkdir()
    run(bases["t5"], tmp_path / "other", "answer", long, dry_run=True, data={"max_length": 50})
    page = preflight(tmp_path / "other")
    assert page["settings"]["length"] == "at most 50 tokens an example: data.max_length"
    assert any("longer" in line or "more tokens than" in line for line in page["warnings"]), page["warnings"]
    (tmp_path / "third").mkdir()
    run(bases["llama"], tmp_path / "third", "answer", {"train": True}, dry_run=True)
    page = preflight(tmp_path / "third")
    assert page["settings"]["length"] == "at most 1,024 tokens an example: the default of data.max_length"
    (warning,) = [line for line in page["warnings"] if "was trained on" in line]
    assert "(32, by the model's config" in warning
    assert "data.max_length=32" in warning


def test_a_stream_is_truncated_although_its_first_examples_are_short(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "PREVIEW_EXAMPLES", 8)
    long = jsonl(tmp_path / "stream.jsonl", rows(30, False, "label") + rows(30, True, "label", 7))
    data = {"train": str(long), "streaming": True, "validation": 8, "test": 8, "labels": ["good", "bad"]}
    run(bases["bert"], tmp_path, "label", {}, data=data, train={"steps": 10})
    assert "the model has 32 positions" in preflight(tmp_path)["settings"]["length"]


def test_virtual_tokens_that_leave_no_room_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"28 virtual tokens leave 4 of the model's 32 positions.*method\.length"):
        run(bases["gpt2"], tmp_path, "answer", {}, method={"name": "PrefixTuning", "length": 28})


def test_a_tokenizer_with_more_entries_than_the_table(bases: dict[str, Path], tmp_path: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(bases["gpt2"])
    size = len(words)
    words.add_special_tokens({"additional_special_tokens": ["<new>"]})
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    base.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    expected = rf"'<new>' \({size}\).*resize_token_embeddings\({size + 1}\)"
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "base", tmp_path, "answer", {})


def test_an_error_in_measuring_during_training_saves_the_adapter_first(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "predict", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(bases["bert"], tmp_path, "label", {})
    kit = kitout.attach(transformers.AutoModelForSequenceClassification.from_pretrained(bases["bert"]).eval())
    adapter = kit.load(tmp_path / "out" / "adapter", name="mine")
    assert all(value.abs().sum() for name, value in adapter.named_parameters() if "heads" not in name)
    assert run(bases["bert"], tmp_path, "label", {}).comparisons["adapter"].changes


def test_an_error_in_measuring_loses_no_adapter(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no metric today")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "predict", fail)
        with pytest.raises(RuntimeError, match="no metric today"):
            run(bases["bert"], tmp_path, "label", {}, evaluate={"steps": 0})
    kit = kitout.attach(transformers.AutoModelForSequenceClassification.from_pretrained(bases["bert"]).eval())
    kit.load(tmp_path / "out" / "adapter", name="mine")
    result = run(bases["bert"], tmp_path, "label", {}, evaluate={"steps": 0})  # measured, without training again
    assert result.comparisons["adapter"].changes
    assert (tmp_path / "out" / "adapter" / "README.md").is_file()
