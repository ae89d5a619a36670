"""The text demo: its options as a run's config, the whole of it on a tiny model and file, and the built-in assets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kitout
from kitout.assets import store
from kitout.base import memory
from kitout.cli.assets import app as assets_app
from kitout.cli.demo import app
from kitout.demo.text import DATA, INSTRUCTION, MODEL, TextDemo, preset
from kitout.train.setup import device
from tiny_models import decoder, jsonl, reviews


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "rows.jsonl", [dict(row) for row in reviews(120)])


def demo(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output


def test_the_preset_is_the_built_in_model_and_tweets() -> None:
    config = preset(TextDemo())
    assert config.model.name == MODEL
    (source,) = config.data.train
    assert (source.path, source.system_prompt, source.limit) == (DATA, INSTRUCTION, 1880)
    assert config.data.test == 600
    assert config.data.validation == 0
    assert config.method.non_default_settings() == {"targets": "all-linear", "alpha": 16.0}
    assert (config.train.lr, config.train.batch_size, config.train.epochs, config.train.weight_decay) == (
        1e-3,
        16,
        1.0,
        0.0,
    )
    assert config.evaluate.prove_merge
    assert config.evaluate.show_examples == 6


def test_options_become_settings(rows: Path) -> None:
    options = TextDemo(
        model=Path("m"), data=rows, text="text", label="label", out=Path("o"), train=64, test=2000, shown=3,
        dtype="float32", epochs=2, lr=2e-3, seed=5,
    )  # fmt: skip
    config = preset(options)
    (source,) = config.data.train
    assert (source.path, source.columns, source.limit) == (str(rows), {"text": "text", "label": "label"}, 2064)
    assert source.system_prompt == "Classify this text as bad or good."
    assert (config.data.test, config.evaluate.max_test_examples, config.evaluate.show_examples) == (2000, 2000, 3)
    assert (config.model.name, config.model.dtype, config.output.folder) == ("m", "float32", Path("o"))
    assert (config.train.lr, config.train.epochs, config.train.seed) == (2e-3, 2.0, 5)
    config = preset(TextDemo(data=rows, instruction="Well?"))
    assert config.data.train[0].system_prompt == "Well?"
    assert config.data.test == pytest.approx(600 / 1880), "a fraction of a user's table, which may be short"


@pytest.mark.parametrize("verb", [(), ("text",)])
def test_it_trains_evaluates_merges_and_saves(model: Path, rows: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    out = tmp_path / "runs" / "demo"
    args = (*verb, "--model", model, "--data", rows, "--out", out, "--lr", "0.01", "--epochs", 2, "--test", 30)
    code, output = demo(*args, "--dtype", "float32")
    assert code == 0, output
    results = json.loads((out / "results.json").read_text())
    accuracy = results["comparisons"]["demo"][0]
    assert accuracy["name"] == "accuracy"
    assert accuracy["base"]["n"] == accuracy["tuned"]["n"] == 30
    assert results["merge"]["demo"] == {"dtype": "float32", "asked": 36, "same": 36, "restored_bit_for_bit": True}
    assert results["labels"]["demo"]
    assert results["processor_seconds"] > 0
    assert len(results["examples"]["demo"]) == 6
    for text in (
        "base", "fine-tuned", "95 % confidence interval", "majority class", "merged into the weights", "kitout.load(",
        "processor time", str(out / "adapter"), str(out / "report.html"), "kitout demo text --data",
    ):  # fmt: skip
        assert text in output
    assert (out / "training.png").is_file()
    kit = kitout.attach(AutoModelForCausalLM.from_pretrained(model))
    kit.load(out / "adapter", name="demo")
    assert kit.num_parameters("demo").total == results["trainable"]["demo"]
    code, output = demo(*args, "--dtype", "float32")
    assert code == 0
    assert "finished" in output
    assert "merged into the weights" in output, "a finished run is shown again"


def test_errors_of_the_user_are_one_line_and_no_traceback(model: Path, rows: Path, tmp_path: Path) -> None:
    for args, expected in (
        (("--model", model, "--data", tmp_path / "no.jsonl"), "there is no file"),
        (("--model", tmp_path, "--data", rows), "no model is there"),
        (("--model", model, "--data", rows, "--text", "words"), "no column 'words'"),
        (("--model", model, "--data", rows, "--dtype", "fp8"), "'fp8'"),
    ):
        code, output = demo(*args, "--out", tmp_path / "out")
        assert code != 0
        assert expected in output
        assert "Traceback" not in output


def test_assets_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path))
    output = CliRunner().invoke(assets_app, ["list"]).output
    for name in store.expand_names(["all"]):
        assert name in output
    result = CliRunner().invoke(assets_app, ["path", "tweets"])
    assert result.exit_code == 1
    assert "kitout assets get tweets" in result.output
    result = CliRunner().invoke(assets_app, ["get", "twets"])
    assert result.exit_code == 1
    assert "'tweets'" in result.output


def test_the_dtype_is_the_requested_one_or_detected() -> None:
    cpu = torch.device("cpu")
    assert device.choose_dtype("fp32", cpu)[0] is torch.float32
    assert device.choose_dtype("bf16", cpu)[0] is torch.bfloat16
    assert device.choose_dtype("auto", cpu)[0] in {torch.float32, torch.bfloat16}
    assert memory.peak(cpu) > 2**20


@pytest.mark.assets
def test_the_built_in_model_answers() -> None:
    from transformers import AutoTokenizer

    here = store.fetch_asset("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(here).eval(), AutoTokenizer.from_pretrained(here)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert tokenizer.model_max_length == 8192


@pytest.mark.assets
def test_the_built_in_image_model_loads_whole() -> None:
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(store.fetch_asset("dinov2-small"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model(pixel_values=torch.zeros(1, 3, 112, 112)).last_hidden_state.shape == (1, 65, 384)


@pytest.mark.assets
def test_the_tweets_are_all_there() -> None:
    from kitout.data.encode.classification import label_set
    from kitout.data.read.sources import load_examples

    (rows,) = load_examples(str(store.fetch_asset("tweets")), "label").splits.values()
    assert len(rows) == 38158
    assert label_set(rows) == ("negative", "neutral", "positive")
