"""Whole runs on tiny models: every objective from a file to a tested adapter; runs resumed, errors reported."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout.errors import ConfigError, KitoutError
from kitout.train.metrics_log import read_metrics
from kitout.train.setup import device
from tiny_models import both, decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")


def run(model: Path, data: Any, out: Path, **more: Any) -> Any:
    output: list[str] = []
    train = {"batch_size": 8, "steps": 6, **more.pop("train", {})}
    settings = {
        "model": {"name": str(model), "dtype": "float32"}, "data": data, "train": train,
        "evaluate": {"generate_examples": 4, **more.pop("evaluate", {})}, "output": {"folder": str(out)}, **more,
    }  # fmt: skip
    result = kitout.train(settings, log=output.append)
    return result, "\n".join(output)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    makers = {"decoder": decoder, "encoder": encoder, "both": both, "vision": vision}
    return {name: make(root / name) for name, make in makers.items()}


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def assert_portable(adapter: Path, *roots: Path) -> None:
    """Nothing that travels with an adapter says where things lay on this machine."""
    for file in adapter.rglob("*"):
        if file.suffix in (".json", ".md"):
            text = file.read_text(encoding="utf-8")
            for root in (*roots, Path(tempfile.gettempdir()), Path.home()):
                assert str(root) not in text, f"{file.name} holds {root}"


def assert_lines_run(output: str, adapter: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of Python that a run ends with, and those of its card, print an answer."""
    printed = output.partition("or in Python:\n")[2]
    card = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert card
    in_card = card[1].replace("FOLDER", str(adapter)).replace("BASE", str(model))
    shown = []
    for code in (textwrap.dedent(printed), in_card):
        capsys.readouterr()
        exec(code, {})
        shown.append(capsys.readouterr().out)
    assert all(shown)


def instruction_rows(number: int) -> list[dict[str, str]]:
    return [{"instruction": "good or bad?", "input": r["text"], "output": r["label"]} for r in reviews(number)]


def test_instructions_from_a_file_to_a_tested_adapter(
    models: dict[str, Path], tmp_path: Path, drawn_plots: None
) -> None:
    data = jsonl(tmp_path / "train.jsonl", instruction_rows(80))
    out = tmp_path / "out"
    result, output = run(models["decoder"], str(data), out, train={"epochs": 2.0, "steps": None, "lr": 1e-2})
    names = {path.name for path in out.iterdir()}
    assert {"adapter", "report.html", "results.json", "run.yaml", "metrics.jsonl", "preflight.txt"} <= names
    assert (out / "adapter" / "README.md").read_text().startswith("---")
    changes = {change.name: change for change in result.comparisons["adapter"].changes}
    assert changes["loss"].tuned.value < changes["loss"].base.value
    assert "held-out" in output
    assert str(out / "report.html") in output
    rows = read_metrics(out / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == result.figures["steps"]
    assert losses[-1] < losses[0]
    assert any("eval_loss" in row for row in rows)
    figures = json.loads((out / "results.json").read_text())
    assert figures["seconds"] > 0
    assert figures["memory"] > 0
    assert figures["estimate"]["memory"] > 0
    assert {change["name"] for change in figures["comparisons"]["adapter"]} == changes.keys()
    assert figures["comparisons"]["adapter"][0]["smallest"].keys() == {"value", "n", "share"}
    for text in (output, (out / "report.html").read_text(), (out / "adapter" / "README.md").read_text()):
        assert "mallest difference that 8 test examples can show (80 % power)" in text
    assert figures["examples"]["adapter"][0].keys() >= {"prompt", "base", "tuned"}

    model = transformers.AutoModelForCausalLM.from_pretrained(models["decoder"])  # as the card says
    kit = kitout.attach(model.eval())
    kit.load(out / "adapter", name="mine")
    assert kit.num_parameters("mine").total == figures["trainable"]["adapter"]
    again, text = run(models["decoder"], str(data), out, train={"epochs": 2.0, "steps": None, "lr": 1e-2})
    assert "finished" in text
    assert text[text.index("next:") :] == output[output.index("next:") :]
    assert again.figures["steps"] == figures["steps"]


OBJECTIVES: dict[str, tuple[str, Any]] = {
    "classification": ("encoder", [{"text": r["text"], "label": r["label"]} for r in reviews(60)]),
    "classify by a decoder": ("decoder", [{"text": r["text"], "label": r["label"]} for r in reviews(60)]),
    "regression": ("encoder", [{"text": r["text"], "label": len(r["text"]) / 10} for r in reviews(60)]),
    "multilabel": (
        "encoder",
        [{"text": r["text"], "labels": [r["label"], "long" if len(r["text"]) > 30 else "short"]} for r in reviews(60)],
    ),
    "token_classification": (
        "encoder",
        [{"tokens": r["text"].split(), "tags": ["O" if w.isdigit() else "W" for w in r["text"].split()]}
         for r in reviews(60)],
    ),
    "seq2seq_lm": ("both", [{"document": r["text"], "summary": r["label"]} for r in reviews(60)]),
    "text": ("decoder", [{"text": r["text"]} for r in reviews(60)]),
    "messages": (
        "decoder",
        [{"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
         for r in reviews(60)],
    ),
    "completions": ("decoder", [{"prompt": r["text"] + ":", "completion": " " + r["label"]} for r in reviews(60)]),
}  # fmt: skip
INFERRED = {
    "classify by a decoder": "classification",
    "text": "causal_lm",
    "messages": "causal_lm",
    "completions": "causal_lm",
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_inferred_from_its_data(
    models: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = OBJECTIVES[name]
    out = tmp_path / "out"
    result, output = run(models[model], str(jsonl(tmp_path / "d.jsonl", rows)), out, train={"steps": 3}, method="LoRA")
    assert result.figures["objective"] == INFERRED.get(name, name)
    assert result.comparisons["adapter"].changes
    kit = _loaded(models[model], result.figures["objective"], out, rows)
    assert kit.names == ["mine"]
    assert_portable(out / "adapter", tmp_path, models[model])
    assert_lines_run(output, out / "adapter", models[model], capsys)
    if name in ("text", "completions"):
        kitout.save_peft(kit, "mine", tmp_path / "peft")
        assert_portable(tmp_path / "peft", tmp_path, models[model])


def _loaded(model: Path, objective: str, out: Path, rows: list[dict[str, Any]]) -> Any:
    from kitout.train.objectives.tasks import TASKS

    labels = {"multilabel": 4, "token_classification": 2, "regression": 1}.get(objective, 2)
    more = {} if objective in ("causal_lm", "seq2seq_lm") else {"num_labels": labels}
    transformers.logging.set_verbosity_error()
    base = getattr(transformers, TASKS[objective].auto_model).from_pretrained(model, **more)
    kit = kitout.attach(base.eval())
    kit.load(out / "adapter", name="mine")
    return kit


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    from PIL import Image

    for color, value in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (tmp_path / "set" / color).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (32, 32), tuple(v + i for v in value)).save(tmp_path / "set" / color / f"{i}.png")
    return tmp_path / "set"


def test_images(models: dict[str, Path], colors: Path, tmp_path: Path, drawn_plots: None) -> None:
    data = {"train": str(colors), "test": 8, "validation": 4}
    result, _ = run(models["vision"], data, tmp_path / "out", train={"steps": 8, "lr": 5e-3})
    assert result.figures["objective"] == "image_classification"
    accuracy = next(c for c in result.comparisons["adapter"].changes if c.name == "accuracy")
    assert accuracy.tuned.value > 0.9
    assert {"confusion.png", "errors.png", "training.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert_portable(tmp_path / "out" / "adapter", tmp_path, models["vision"])
    right = [p == t for p, t in zip(*(result.figures[k]["adapter"] for k in ("predicted", "true")), strict=True)]
    assert sum(right) / len(right) == accuracy.tuned.value
    (row,) = result.figures["adapters"]
    assert (row["metric"], row["score"]["value"], row["examples"]) == ("accuracy", accuracy.tuned.value, 64)


def test_jobs_at_once_each_with_its_own(models: dict[str, Path], tmp_path: Path, drawn_plots: None) -> None:
    one, two = (
        jsonl(tmp_path / "one.jsonl", instruction_rows(40)),
        jsonl(tmp_path / "two.jsonl", instruction_rows(60)[::-1]),
    )
    jobs = [
        {"name": "first", "method": "LoRA", "train": {"steps": 3, "seed": 1}},
        {"name": "second", "method": "IA3", "data": str(two), "train": {"steps": 5, "lr": 2e-2}},
    ]
    result, output = run(models["decoder"], str(one), tmp_path / "both", jobs=jobs, train={"batch_size": 4})
    assert set(result.comparisons) == {"first", "second"}
    assert result.figures["steps"] == 5
    rows = result.figures["adapters"]
    assert [(row["name"], row["examples"]) for row in rows] == [("first", 12), ("second", 20)]
    assert all(row["seconds"] > 0 and row["processor_seconds"] > 0 for row in rows)
    assert sum(row["seconds"] for row in rows) <= result.figures["seconds"]
    assert not (tmp_path / "both" / "comparison.png").is_file()  # the test splits differ
    page = (tmp_path / "both" / "report.html").read_text()
    assert "Adapters side by side" in page
    assert "the metrics are not comparable" in page
    assert "one seed each" not in output
    assert {p.name for p in (tmp_path / "both" / "adapter").iterdir()} == {"first", "second"}
    alone, _ = run(
        models["decoder"], str(one), tmp_path / "one", method="LoRA", train={"batch_size": 4, "steps": 3, "seed": 1}
    )
    joint, single = (_tensors(path) for path in (tmp_path / "both/adapter/first", tmp_path / "one/adapter"))
    assert joint.keys() == single.keys()
    assert max((joint[k] - single[k]).abs().max().item() for k in joint) <= 1e-6
    assert "first: " in output
    assert "second: " in output
    assert alone.figures["data"]["adapter"] == result.figures["data"]["first"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_a_stream_is_read_while_training(models: dict[str, Path], tmp_path: Path) -> None:
    data = {
        "train": str(jsonl(tmp_path / "d.jsonl", instruction_rows(90))),
        "streaming": True,
        "test": 10,
        "validation": 6,
    }
    result, _ = run(models["decoder"], data, tmp_path / "out", train={"steps": 14})
    assert result.figures["steps"] == 14  # more than one epoch


def test_a_dry_run_stops_before_the_first_step(models: dict[str, Path], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", instruction_rows(40))
    config = {
        "model": {"name": str(models["decoder"]), "dtype": "float32"},
        "data": str(data),
        "output": {"folder": str(tmp_path / "o")},
    }
    result = kitout.train(config, dry_run=True, log=lambda _: None)
    assert (tmp_path / "o" / "preflight.txt").is_file()
    assert not result.comparisons
    assert not (tmp_path / "o" / "adapter").exists()
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


SCRIPT = """
import sys, kitout
kitout.train({"model": {"name": sys.argv[1], "dtype": "float32"}, "data": sys.argv[2],
    "output": {"folder": sys.argv[3]}, "method": {"name": "LoRA", "dropout": 0.1},
    "train": {"batch_size": 8, "steps": 40, "save_steps": 2, "lr": 1e-2},
    "evaluate": {"steps": 10, "generate_examples": 2}})
"""


def test_a_killed_run_resumes_bit_identically(models: dict[str, Path], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", instruction_rows(80))
    words = [sys.executable, "-c", SCRIPT, str(models["decoder"]), str(data)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*words, str(tmp_path / "whole")], check=True, **quiet)
    out = tmp_path / "killed"
    for steps in (4, 16):  # killed twice, somewhere after these steps
        process = subprocess.Popen([*words, str(out)], **quiet)
        while process.poll() is None and len(_logged(out)) <= steps:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "results.json").exists(), "it was killed too late to test anything"
    subprocess.run([*words, str(out)], check=True, **quiet)
    assert _losses(out) == _losses(tmp_path / "whole")
    ours, theirs = _tensors(out / "adapter"), _tensors(tmp_path / "whole" / "adapter")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_two_processes_with_a_sharded_base_give_the_same_result(models: dict[str, Path], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", instruction_rows(60))
    settings = [
        "model.dtype=float32",
        "train.steps=3",
        "train.batch_size=8",
        "evaluate.generate_examples=2",
        "method=LoRA",
    ]
    words = ["-m", "kitout", "train", "--model", str(models["decoder"]), "--data", str(data), *settings]
    quiet: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for extra, start in (
        (["--out", str(tmp_path / "one")], []),
        (["--out", str(tmp_path / "two"), "train.fsdp=true"], launch),
    ):
        done = subprocess.run([sys.executable, *(["-m", *start] if start else []), *words, *extra], **quiet)
        assert done.returncode == 0, done.stdout[-3000:]
    ours, theirs = _tensors(tmp_path / "two" / "adapter"), _tensors(tmp_path / "one" / "adapter")
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) <= 1e-6
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert figures[0]["tokens"] == figures[1]["tokens"]
    for one, two in zip(figures[0]["comparisons"]["adapter"], figures[1]["comparisons"]["adapter"], strict=True):
        assert one["tuned"]["value"] == pytest.approx(two["tuned"]["value"], abs=1e-4)


def _logged(out: Path) -> list[Any]:
    return (
        [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        if (out / "metrics.jsonl").exists()
        else []
    )


def _losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in _logged(out)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "nowhere/at-all"}}, "nowhere/at-all"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"train": {"lr": 30.0}}, "lr=30"),
        ({"model": {"name": "DECODER", "dtype": "float16", "device": "cpu"}}, "float16"),
        ({"method": "VPT"}, "VPT"),
        ({"data": {"train": [{"path": "DATA", "columns": {"instruction": "what"}}]}}, "what"),
        ({"train": {"fsdp": True}}, "torchrun"),
        ({"objective": "classification"}, "label"),
    ],
)
def test_errors_are_reported_before_anything_expensive(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = jsonl(tmp_path / "d.jsonl", instruction_rows(40))
    words = json.dumps(change).replace("DECODER", str(models["decoder"])).replace("DATA", str(data))
    base = {"model": {"name": str(models["decoder"])}, "data": str(data), "output": {"folder": str(tmp_path / "o")}}
    with pytest.raises(KitoutError, match=message.replace("/", ".")):
        kitout.train(base | json.loads(words), log=lambda _: None)


def test_a_method_on_a_model_it_cannot_serve(models: dict[str, Path], colors: Path, tmp_path: Path) -> None:
    data = {"train": str(colors), "test": 8, "validation": 4}
    with pytest.raises(KitoutError, match="choose method=VPT"):
        run(models["vision"], data, tmp_path / "o", method="PromptTuning")


def test_other_data_in_the_same_folder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", instruction_rows(40))
    run(models["decoder"], str(data), tmp_path / "o", train={"steps": 2})
    (tmp_path / "o" / "results.json").unlink()
    jsonl(tmp_path / "d.jsonl", instruction_rows(40)[::-1][:30])
    with pytest.raises(ConfigError, match="another run"):
        run(models["decoder"], str(data), tmp_path / "o", train={"steps": 2})


def test_the_dtype_that_auto_found_holds_for_the_whole_run(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = iter([(torch.bfloat16, "first timing"), (torch.float32, "second timing")])
    monkeypatch.setattr(device, "choose_dtype", lambda *_: next(timings))
    out = tmp_path / "out"
    config = {
        "model": str(models["decoder"]), "data": str(jsonl(tmp_path / "d.jsonl", instruction_rows(40))),
        "train": {"batch_size": 8, "steps": 2}, "evaluate": {"generate_examples": 2}, "output": {"folder": str(out)},
    }  # fmt: skip
    first = kitout.train(config, log=lambda _: None)
    (out / "results.json").unlink()
    second = kitout.train(config, log=lambda _: None)  # resumed, not refused as another run
    assert next(timings, None) is None
    assert first.figures["machine"]["dtype"] == second.figures["machine"]["dtype"] == "bfloat16"
    assert json.loads((out / "resolved.json").read_text()) == {"dtype": "bfloat16", "dtype_reason": "first timing"}
    assert "bfloat16 (first timing)" in (out / "preflight.txt").read_text()
    assert _losses(out)
