"""Corner cases of whole runs that users met: odd bases, odd settings, odd files; they work, or an error says why."""

from __future__ import annotations

import gzip
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout.errors import KitoutError
from kitout.train.config import conflicts
from kitout.train.config.load import load
from tiny_models import decoder, encoder, jsonl, reviews, tokenizer

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"decoder": decoder(root / "decoder"), "encoder": encoder(root / "encoder")}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "texts.jsonl", [{"text": r["text"], "label": r["label"]} for r in reviews(40)])


@pytest.fixture
def qa(tmp_path: Path) -> Path:
    rows = [{"prompt": r["text"] + ":", "completion": " " + r["label"]} for r in reviews(40)]
    return jsonl(tmp_path / "qa.jsonl", rows)


def run(model: Path, data: Any, out: Path, **more: Any) -> Any:
    train = {"batch_size": 8, "steps": 2, **more.pop("train", {})}
    settings = {
        "model": {"name": str(model), "dtype": "float32"}, "data": data, "train": train,
        "evaluate": {"generate_examples": 2, **more.pop("evaluate", {})}, "output": {"folder": str(out)}, **more,
    }  # fmt: skip
    return kitout.train(settings, log=lambda _: None)


def run_card(folder: Path, base: Path) -> Any:
    """Runs the card's own lines and returns the kit they make. base: where the card asks for it."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    code = code.replace('"FOLDER"', repr(str(folder))).replace('"BASE"', repr(str(base)))
    exec(compile(code, str(folder), "exec"), names)
    return names["p"].kit


def test_a_decoder_without_a_padding_id_classifies_and_its_card_shows_how(tmp_path: Path, texts: Path) -> None:
    words = tokenizer(template=False)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=48, n_layer=2, n_head=4, n_positions=128, bos_token_id=2, eos_token_id=3
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    words.pad_token = None
    words.save_pretrained(tmp_path / "base")
    result = run(tmp_path / "base", str(texts), tmp_path / "out", objective="classification")
    assert result.comparisons["adapter"].changes
    kit = run_card(tmp_path / "out" / "adapter", tmp_path / "base")
    assert kit(input_ids=torch.tensor([[5, 6, 7], [8, 9, 1]])).logits.shape == (2, 2)


def test_a_checkpoint_with_other_labels_and_jobs_with_their_own(
    models: dict[str, Path], tmp_path: Path, texts: Path
) -> None:
    two = transformers.AutoModelForSequenceClassification.from_pretrained(models["encoder"], num_labels=5)
    two.save_pretrained(tmp_path / "base")
    tokenizer(template=False).save_pretrained(tmp_path / "base")
    rows = [{"text": r["text"], "label": "abc"[i % 3]} for i, r in enumerate(reviews(30))]
    other = jsonl(tmp_path / "other.jsonl", rows)
    jobs = [{"name": "one"}, {"name": "two", "data": str(other)}]
    run(tmp_path / "base", str(texts), tmp_path / "out", jobs=jobs)
    cards = {name: (tmp_path / "out/adapter" / name / "README.md").read_text() for name in ("one", "two")}
    assert "| bad, good |" in cards["one"]
    assert "| a, b, c |" in cards["two"]
    assert "texts.jsonl" not in cards["two"].split("## Settings")[0]
    kit = run_card(tmp_path / "out" / "adapter" / "two", tmp_path / "base")
    assert kit(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)


def test_answers_are_generated_under_activation_checkpointing(
    models: dict[str, Path], tmp_path: Path, qa: Path
) -> None:
    losses = []
    for name, again in (("kept", False), ("again", True)):
        result = run(models["decoder"], str(qa), tmp_path / name, train={"activation_checkpointing": again})
        losses.append(next(c for c in result.comparisons["adapter"].changes if c.name == "loss").tuned.value)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"best_metric": "nonsense"}, "known: .*'loss'"),
        (
            {"best_metric": "exact_match", "generate_examples": 0},
            "evaluate.best_metric=exact_match is not evaluated here",
        ),
    ],
)
def test_a_best_metric_that_is_not_evaluated(
    models: dict[str, Path], tmp_path: Path, qa: Path, evaluate: dict[str, Any], message: str
) -> None:
    with pytest.raises(KitoutError, match=message):
        run(models["decoder"], str(qa), tmp_path / "out", evaluate=evaluate)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load({"model": "m", "data": "d", "output": {"report_to": ["wandb", "tensorboard"]}})
    with pytest.raises(KitoutError, match=r"report_to=wandb.*\n.*report_to=tensorboard"):
        conflicts.check_machine(config, has_cuda=False)


@pytest.mark.parametrize(
    ("begins", "message"), [(gzip.compress(b"{}\n", mtime=0), "gzip"), (b"\x80\x04\x95\xff", "pickle")]
)
def test_a_file_of_another_kind_under_the_name_of_a_table(tmp_path: Path, begins: bytes, message: str) -> None:
    from kitout.data.read import tables

    (tmp_path / "d.jsonl").write_bytes(begins)
    with pytest.raises(KitoutError, match=message):
        tables.read_rows(tmp_path / "d.jsonl")


def test_numbers_of_a_table_without_types_are_numbers_and_some_are_held_out(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def table(*last: str) -> str:
        lines = [f"text {i},{i * 0.5}" for i in range(40)]
        (tmp_path / "d.csv").write_text("\n".join(["text,score", *lines, *last]) + "\n")
        return str(tmp_path / "d.csv")

    result = run(models["encoder"], table(), tmp_path / "out")
    assert result.figures["objective"] == "regression"
    assert result.comparisons["adapter"].changes[0].base.n == 4
    with pytest.raises(KitoutError, match=r"d.csv:42: label 'nan' is not a finite number"):
        run(models["encoder"], table("text,nan"), tmp_path / "refused")


def test_labels_of_one_example_each_leave_nothing_to_hold_out(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": f"label {i}"} for i in range(30)]
    data = str(jsonl(tmp_path / "d.jsonl", rows))
    with pytest.raises(KitoutError, match=r"data\.test=0"):
        run(models["encoder"], data, tmp_path / "out")
    kitout.train(
        {"model": str(models["encoder"]), "data": {"train": data, "test": 0, "validation": 0}}
        | {"output": {"folder": str(tmp_path / "out")}},
        dry_run=True,
    )
    assert "30 of 30 labels have one example each" in (tmp_path / "out" / "preflight.txt").read_text()


def test_an_answer_without_a_prompt_is_trained_on_and_not_generated(models: dict[str, Path], tmp_path: Path) -> None:
    def rows(name: str, first: int) -> str:
        some = [{"prompt": "" if i % 4 == 0 else f"{i}:", "completion": f" word {i}"} for i in range(first, first + 12)]
        return str(jsonl(tmp_path / name, some))

    data = {"train": rows("d.jsonl", 0), "test": rows("t.jsonl", 20), "validation": rows("v.jsonl", 40)}
    assert run(models["decoder"], data, tmp_path / "out").figures["steps"] == 2


def test_half_of_a_surrogate_pair_is_reported_with_its_line(tmp_path: Path) -> None:
    from kitout.data.read import tables

    row = '{"text": "\\ud800 x"}'
    (tmp_path / "d.jsonl").write_text(f'{{"text": "\\ud83d\\ude00"}}\n{row}\n')
    (tmp_path / "d.json").write_text(f"[{row}]")
    for name, message in (("d.jsonl", "line 2: half of a surrogate"), ("d.json", "object 1: half of a surrogate")):
        with pytest.raises(KitoutError, match=message):
            tables.read_rows(tmp_path / name)


def test_a_disk_that_is_full_at_the_end_is_reported_and_the_same_call_finishes(
    models: dict[str, Path], tmp_path: Path, qa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    from kitout.train import outputs

    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    named = outputs.adapter_folders

    def full(*given: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, free[1]))
        return named(*given)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(outputs, "adapter_folders", full)
    try:
        with pytest.raises(KitoutError, match="make room"):
            run(models["decoder"], str(qa), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.undo()
    assert run(models["decoder"], str(qa), tmp_path / "out").comparisons
    run_card(tmp_path / "out" / "adapter", models["decoder"])
    names = {path.name for path in (tmp_path / "out").rglob(".*")}
    assert names == {".run.lock"}


def test_one_answer_to_everything_is_warned_of() -> None:
    from kitout.data.encode.item import EncodedExample
    from kitout.data.statistics import compute_statistics

    def items(*answers: str) -> list[EncodedExample]:
        return [EncodedExample((5, 6, 7), (-100, 6, 7), reference=answer, prompt_length=1) for answer in answers]

    assert any(
        "every answer is 'bad'" in warning
        for warning in compute_statistics({"train": items("bad", "bad", "bad")}).warnings
    )
    assert not any(
        "every answer" in warning for warning in compute_statistics({"train": items("bad", "good")}).warnings
    )
    assert not any("every answer" in warning for warning in compute_statistics({"train": items("", "")}).warnings)


def test_a_head_rate_far_too_high_is_refused_and_patience_warns_of_nothing(
    models: dict[str, Path], tmp_path: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KitoutError, match="head_lr=30"):
        run(models["encoder"], str(texts), tmp_path / "out", train={"head_lr": 30.0})
    train = {"early_stopping_patience": 1, "steps": 12, "lr": 1e-8, "head_lr": 1e-8}
    transformers.logging.enable_propagation()
    result = run(
        models["encoder"], str(texts), tmp_path / "out", train=train, evaluate={"steps": 1, "best_metric": "accuracy"}
    )
    assert result.figures["steps"] < 12
    transformers.logging.disable_propagation()
    assert "EarlyStopping" not in caplog.text


def test_targets_and_a_rank_that_one_module_cannot_hold(models: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    method = {"name": "LoRA", "rank": 50, "targets": "all-linear -re:.*(key|query)"}
    kitout.train(
        {
            "model": str(models["encoder"]),
            "data": str(texts),
            "method": method,
            "output": {"folder": str(tmp_path / "o")},
        },
        dry_run=True,
    )
    text = " ".join((tmp_path / "o" / "preflight.txt").read_text().split())
    assert "! rank clipped to what the site can hold: " in text
    assert "x value (50 -> " in text
    assert "attn.q" not in text
