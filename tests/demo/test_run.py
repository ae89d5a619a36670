"""The whole demo on a tiny model and a tiny file, through the command line a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kitout
from kitout.assets import store
from kitout.base import memory
from kitout.cli.assets import app as assets_app
from kitout.cli.demo import app
from kitout.demo.screen import Screen
from kitout.train.setup import device

from .tiny import folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    kinds = ("good", "bad")
    lines = [{"text": f"{'yes' if i % 2 else 'no'} {i * 7919}", "label": kinds[i % 2]} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "rows.jsonl"


def demo(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_it_trains_measures_merges_and_keeps(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    code, said = demo("--model", model, "--data", rows, "--out", out, "--lr", "0.01", "--epochs", 2, "--test", 30)
    assert code == 0, said
    held = json.loads((out / "results.json").read_text())
    assert held["base"]["texts"] == held["tuned"]["texts"] == 30
    assert held["merged"]["restored_bit_for_bit"]
    assert held["merged"]["same"] == held["merged"]["asked"] == 6 + 30
    assert held["training"]["step"] == held["training"]["steps"] == len(held["training"]["losses"])
    assert held["adapter"]["trainable"] > 0
    for part in ("base", "tuned", "95 % confidence interval", "training: ", "kit.load("):
        assert part in said
    assert not (out / "checkpoint.safetensors").exists()
    kit = kitout.attach(AutoModelForCausalLM.from_pretrained(model))
    kit.load(out / "adapter", name="demo")
    assert kit.num_parameters("demo").total == held["adapter"]["trainable"]


def test_running_again_gives_the_same_figures(model: Path, rows: Path, tmp_path: Path) -> None:
    figures = []
    for _ in range(2):
        code, said = demo("--model", model, "--data", rows, "--out", tmp_path / "out", "--dtype", "fp32")
        assert code == 0, said
        held = json.loads((tmp_path / "out" / "results.json").read_text())
        figures.append((held["tuned"]["right"], held["training"]["losses"], held["answers"]))
    assert figures[0] == figures[1]


def test_faults_of_the_user_are_one_line_and_no_trace(model: Path, rows: Path, tmp_path: Path) -> None:
    for words, expected in (
        (("--model", model, "--data", tmp_path / "no.jsonl"), "there is no file"),
        (("--model", tmp_path, "--data", rows), "holds no config.json"),
        (("--model", model, "--data", rows, "--text", "words"), "no column 'words'"),
        (("--model", model, "--data", rows, "--dtype", "fp8"), "use auto, bf16 or fp32"),
    ):
        code, said = demo(*words)
        assert code != 0
        assert expected in said
        assert "Traceback" not in said


def test_assets_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path))
    said = CliRunner().invoke(assets_app, ["list"]).output
    for name in store.names(["all"]):
        assert name in said
    done = CliRunner().invoke(assets_app, ["path", "tweets"])
    assert done.exit_code == 1
    assert "kitout assets get tweets" in done.output
    done = CliRunner().invoke(assets_app, ["get", "twets"])
    assert done.exit_code == 1
    assert "'tweets'" in done.output


def test_bars_on_a_terminal_and_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        screen = Screen(Console(force_terminal=terminal, width=100))
        with screen.phase("counting") as tell:
            for i in range(101):
                tell(i, 100, "loss 0.5")
    assert "counting: 100/100  loss 0.5" in capsys.readouterr().out


def test_the_number_format_can_be_asked_for_and_is_found_otherwise() -> None:
    cpu = torch.device("cpu")
    assert device.dtype("fp32", cpu)[0] is torch.float32
    assert device.dtype("bf16", cpu)[0] is torch.bfloat16
    assert device.dtype("auto", cpu)[0] in {torch.float32, torch.bfloat16}
    assert memory.peak(cpu) > 2**20


@pytest.mark.assets
def test_the_embedded_model_speaks() -> None:
    from transformers import AutoTokenizer

    here = store.get("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(here).eval(), AutoTokenizer.from_pretrained(here)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert tokenizer.model_max_length == 8192


@pytest.mark.assets
def test_the_embedded_image_model_loads_whole() -> None:
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(store.get("dinov2-small"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model(pixel_values=torch.zeros(1, 3, 112, 112)).last_hidden_state.shape == (1, 65, 384)


@pytest.mark.assets
def test_the_tweets_are_all_there() -> None:
    from kitout.demo.data import load, unique

    rows = load(store.get("tweets") / "tweets.jsonl")
    assert len(rows) == 38158
    assert {row.label for row in rows} == {"negative", "neutral", "positive"}
    assert 34_000 < len(unique(rows)) < 37_000
