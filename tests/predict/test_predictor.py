"""From a run to predictions: every task, equal to the run's own and to the kit called by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import kitout
from kitout.errors import ConfigError, DataError, FileError, WrongBase
from kitout.predict.load import find_base
from kitout.predict.prediction import Prediction
from kitout.predict.predictor import Predictor
from kitout.predict.saved_adapters import SavedAdapter, read_folders
from tiny_models import both, decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")

TASKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "classification": ("encoder", [{"text": r["text"], "label": r["label"]} for r in reviews(60)]),
    "classes of a decoder": ("decoder", [{"text": r["text"], "label": r["label"]} for r in reviews(60)]),
    "regression": ("encoder", [{"text": r["text"], "label": len(r["text"]) / 10} for r in reviews(60)]),
    "multilabel": (
        "encoder",
        [{"text": r["text"], "labels": [r["label"], "long" if len(r["text"]) > 30 else "short"]} for r in reviews(60)],
    ),
    "tokens": (
        "encoder",
        [{"tokens": r["text"].split(), "tags": ["O" if w.isdigit() else "W" for w in r["text"].split()]}
         for r in reviews(60)],
    ),
    "seq2seq": ("both", [{"document": r["text"], "summary": r["label"]} for r in reviews(60)]),
    "closed answers": (
        "decoder",
        [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(60)],
    ),
    "messages": (
        "decoder",
        [{"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["text"][::-1]}]}
         for r in reviews(60)],
    ),
    "completions": ("decoder", [{"prompt": r["text"] + ":", "completion": " " + r["text"][:9]} for r in reviews(60)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    makers = {"decoder": decoder, "encoder": encoder, "both": both, "vision": vision}
    return {name: make(root / name) for name, make in makers.items()}


def train(model: Path, data: Any, out: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "model": {"name": str(model), "dtype": "float32"}, "data": data, "train": {"batch_size": 8, "steps": 6},
        "evaluate": {"generate_examples": 0, "max_new_tokens": 5}, "output": {"folder": str(out)}, **more,
    }  # fmt: skip
    return dict(kitout.train(settings, log=lambda _line: None).figures)


@pytest.fixture(scope="module")
def run_of(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Task -> the figures of its run and the run's folder; each is trained once, when it is first asked for."""

    @functools.cache
    def run(name: str) -> tuple[dict[str, Any], Path]:
        model, rows = TASKS[name]
        root = tmp_path_factory.mktemp("run")
        return train(models[model], str(jsonl(root / "d.jsonl", rows)), root / "out"), root / "out"

    return run


@pytest.fixture(scope="module", params=TASKS)
def trained(request: pytest.FixtureRequest, run_of: Callable[[str], Any]) -> Any:
    """One run per task, its rows, its figures and the adapter loaded again."""
    figures, out = run_of(request.param)
    return request.param, TASKS[request.param][1], figures, kitout.load(out / "adapter"), out


def test_a_text_and_a_row_and_a_list(trained: Any) -> None:
    name, rows, figures, predictor, _ = trained
    assert isinstance(predictor, Predictor)
    assert predictor.usage.task == figures["objective"]
    values = rows[:5]
    predictions = predictor(values)
    assert all(isinstance(p, Prediction) for p in predictions)
    assert [p.to_dict().keys() for p in predictions] == [predictions[0].to_dict().keys()] * 5
    alone = [predictor(value) for value in values]
    for together, single in zip(predictions, alone, strict=True):
        assert_close(together, single)
    main = {
        "tokens": "tokens",
        "closed answers": "input",
        "messages": "messages",
        "completions": "prompt",
        "seq2seq": "document",
    }.get(name, "text")
    text = values[0][main]
    text = text if isinstance(text, str) else text[0]["content"] if isinstance(text[0], dict) else " ".join(text)
    if name != "closed answers":  # there the text alone is an instruction without its context
        assert_close(predictor(text), predictions[0])
    assert isinstance(str(predictions[0]), str)
    json.dumps(predictions[0].to_dict())


def assert_close(a: Prediction, b: Prediction) -> None:
    assert (a.label, a.labels, a.words, a.tags, a.text) == (b.label, b.labels, b.words, b.tags, b.text)
    for one, other in ((a.probabilities, b.probabilities), ({"": a.value}, {"": b.value})):
        if one is not None and other is not None and None not in one.values():
            assert one == pytest.approx(other, abs=1e-5)


def test_predictions_are_those_of_the_run(trained: Any) -> None:
    """results.json holds what the run predicted for its test examples."""
    name, rows, figures, predictor, out = trained
    report = figures["predicted"].get("adapter")
    if not report or name in ("seq2seq", "messages", "completions"):
        pytest.skip("this task has no labels")
    from kitout.data.read.sources import load_examples
    from kitout.data.split import split_examples

    examples = load_examples(out.parent / "d.jsonl").splits
    splits = split_examples(dict(examples), 0.05, 0.1, 0, stratify=name != "regression")
    keys = [e.exact_key for e in examples[""]]
    inputs = [rows[keys.index(e.exact_key)] for e in splits.test]
    predictions = predictor(inputs)
    labels = predictor.usage.labels
    if name == "regression":
        assert [p.value for p in predictions] == pytest.approx(report, abs=1e-4)
    elif name == "multilabel":
        assert [[int(label in p.labels) for label in labels] for p in predictions] == report
    elif name == "tokens":
        assert [[labels.index(t) for t in p.tags] for p in predictions] == report
    elif name == "closed answers":
        assert [p.label for p in predictions] == report
    else:
        assert [labels.index(p.label) for p in predictions] == report


def test_equal_to_the_kit_by_hand(models: dict[str, Path], run_of: Callable[[str], Any]) -> None:
    rows = TASKS["classification"][1]
    _, out = run_of("classification")
    predictor = kitout.load(out)  # the run folder is taken too
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models["encoder"], num_labels=2)
    kit = kitout.attach(model.eval())
    kit.load(out / "adapter", name="mine")
    kit.use("mine")
    batch = predictor.tokenizer(rows[0]["text"], return_tensors="pt")
    with torch.no_grad():
        by_hand = kit(**batch).logits.softmax(-1)[0].tolist()
    assert list(predictor(rows[0]["text"]).probabilities.values()) == pytest.approx(by_hand, abs=1e-6)
    predictor.use(None)  # the checkpoint holds no classifier: its answers would be random
    with pytest.raises(ConfigError, match="the base has no trained classifier"):
        predictor(rows[0]["text"])


def test_chat_and_generate(run_of: Callable[[str], Any]) -> None:
    p = kitout.load(run_of("messages")[1] / "adapter")
    answer = p.chat([{"role": "user", "content": "the cat"}], max_new_tokens=6)
    assert "".join(p.chat("the cat", max_new_tokens=6, stream=True)).strip() == answer
    assert p("the cat").text.startswith(answer[:2])
    text = p.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = p.kit.generate(**text, max_new_tokens=6, do_sample=False)
    assert p.tokenizer.decode(out[0, text["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer
    assert isinstance(p.generate("the cat", max_new_tokens=3), str)
    torch.manual_seed(0)
    sampled = p.chat("the cat", max_new_tokens=8, temperature=5.0, top_k=50)
    torch.manual_seed(0)
    assert p.chat("the cat", max_new_tokens=8, temperature=5.0, top_k=50) == sampled
    pieces = p.chat("the cat", max_new_tokens=100, stream=True)
    next(pieces, None)
    pieces.close()  # generation ends with the iterator
    with pytest.raises(ConfigError, match=r"predictor\.chat"):
        p([{"role": "user", "content": "x"}])
    with pytest.raises(DataError, match="ends with an assistant turn"):
        p.chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])


def test_images_with_the_size_of_training(models: dict[str, Path], tmp_path: Path) -> None:
    """The stock processor has another size: with it the same image would be seen differently."""
    rng = np.random.default_rng(0)
    for kind, low in {"dark": 0, "light": 120}.items():
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(low, low + 100, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{i}.png")
    data = {"train": str(tmp_path / "images"), "image_size": 16, "test": 8, "validation": 0}
    figures = train(models["vision"], data, tmp_path / "out", train={"batch_size": 8, "steps": 8, "lr": 1e-2})
    p = kitout.load(tmp_path / "out" / "adapter")
    assert p.usage.images.size == 16
    path = tmp_path / "images" / "light" / "0.png"
    first = p(path)
    assert_close(p(Image.open(path)), first)
    assert_close(p(np.asarray(Image.open(path))), first)
    assert_close(p([path, path.read_bytes()])[1], first)
    assert figures["labels"] == {} or first.label in ("dark", "light")
    with pytest.raises(DataError, match="input 2"):
        p([path, tmp_path / "d.jsonl"])
    with pytest.raises(ConfigError, match="does not write"):
        p.chat("hi")


def test_no_path_of_the_training_machine(trained: Any, models: dict[str, Path]) -> None:
    *_, out = trained
    text = (out / "adapter" / "adapter.json").read_text()
    assert str(models["decoder"].parent) not in text
    assert str(out) not in text


def test_a_base_that_is_not_found_and_another_base(
    models: dict[str, Path], run_of: Callable[[str], Any], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(run_of("classification")[1] / "adapter", tmp_path / "alone")  # away from its run.yaml
    with pytest.raises(ConfigError, match="base='FOLDER'"):
        kitout.load(tmp_path / "alone")
    assert kitout.load(tmp_path / "alone", base=models["encoder"])("the cat").label in ("good", "bad")
    other = transformers.AutoModelForSequenceClassification.from_pretrained(models["encoder"])
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.5)
    shutil.copytree(models["encoder"], tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBase):
        kitout.load(tmp_path / "alone", base=tmp_path / "other")
    with pytest.raises(FileError, match="holds no adapter"):
        kitout.load(tmp_path / "other")


def test_a_dtype_or_a_device_that_is_none(models: dict[str, Path]) -> None:
    for wrong in ("int3", torch.float64, 16):
        found = str(wrong).removeprefix("torch.")
        with pytest.raises(ConfigError, match=f"dtype: expected 'auto', .* or 'float16', found '{found}'") as raised:
            kitout.load(base=models["decoder"], dtype=wrong)
        assert "pydantic" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"device: expected 'auto', 'cpu' or 'cuda', found 'tpu'"):
        kitout.load(base=models["decoder"], device="tpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(models["decoder"], dtype=torch.float32)
    for dtype, words in (("int3", "expected 'auto'"), ("bfloat16", "base is a model already, and not in bfloat16")):
        with pytest.raises(ConfigError, match=words):
            kitout.load(base=model, dtype=dtype)
    assert kitout.load(base=model, dtype="float32").kit.base is model


def test_an_adapter_without_a_task(models: dict[str, Path], tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(models["decoder"])
    kit = kitout.attach(model.eval())
    kit.add("plain", kitout.LoRA(), seed=0)
    kit.save("plain", tmp_path / "a")
    kitout.save_peft(kit, "plain", tmp_path / "b")
    kit.detach()
    with pytest.raises(ConfigError, match="give task="):
        kitout.load(tmp_path / "a", base=models["decoder"])
    p = kitout.load(tmp_path / "a", base=models["decoder"], task="causal_lm")
    assert isinstance(p.chat("the cat", max_new_tokens=3), str)
    model = transformers.AutoModelForCausalLM.from_pretrained(models["decoder"])
    model.config._name_or_path = "org/tiny"  # as from the hub
    kit = kitout.attach(model.eval())
    kit.add("plain", kitout.LoRA(), seed=0)
    kit.save("plain", tmp_path / "named")
    kit.detach()
    assert find_base([SavedAdapter(tmp_path, "plain", base="org/tiny")], None) == "org/tiny"
    assert read_folders([tmp_path / "named"], True)[0].base == "org/tiny"
    with pytest.raises(ConfigError, match="does not say which base"):
        kitout.load(tmp_path / "a", task="causal_lm")
    with pytest.raises(ConfigError, match="a local folder named 'llama', which is not found"):
        find_base([SavedAdapter(tmp_path, "x", base="/home/someone/models/llama", is_peft=True)], None)
    both_of_them = kitout.load(
        tmp_path / "a", tmp_path / "b", base=models["decoder"], task="causal_lm", dtype="float32"
    )
    assert both_of_them.names == ["plain", "b"]
    base_alone = kitout.load(base=models["decoder"])
    assert base_alone.chat("the cat", max_new_tokens=3) is not None
