"""The pages of the first hour, typed as they stand: every command of a journey, then its Python, on tiny models.

A page's `sh` blocks are its commands, at most so many; the models that it names stand in the folder as tiny ones, and
the data that it describes is made here. Each prediction is that of the kit called by hand.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import kitout
from kitout.cli import app
from pages import blocks
from tiny_models import decoder, encoder, jsonl, reviews, vision

pytest.importorskip("accelerate")

DOCS = Path(__file__).parents[1] / "docs"


def make_tickets() -> None:
    encoder(Path("minilm"))
    for name, rows in {"tickets.csv": reviews(80), "new.csv": reviews(12, seed=1)}.items():
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"] if name == "tickets.csv" else ["id", "text"])
            writer.writeheader()
            for number, row in enumerate(rows):
                writer.writerow(row if name == "tickets.csv" else {"id": number, "text": row["text"]})


def make_pairs() -> None:
    decoder(Path("smollm2-135m"))
    rows = [{"instruction": r["text"], "output": r["text"][::-1]} for r in reviews(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_photos() -> None:
    vision(Path("dinov2-small"))
    rng = np.random.default_rng(0)
    for folder, number in {"photos/dark": 14, "photos/light": 14, "new-photos": 2}.items():
        Path(folder).mkdir(parents=True)
        low = 120 if folder.endswith("light") else 0
        for i in range(1, number + 1):
            pixels = rng.integers(low, low + 100, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{i}.png")


def make_preferences() -> None:
    decoder(Path("smollm2-135m"))
    texts = [row["text"] for row in reviews(24)]
    chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": "the good cat"}] for t in texts]
    jsonl(Path("chats.jsonl"), [{"messages": chat} for chat in chats])
    jsonl(Path("pairs.jsonl"), [{"prompt": t, "chosen": "the good cat", "rejected": "the bad dog"} for t in texts])
    jsonl(Path("prompts.jsonl"), [{"prompt": t} for t in texts])


JOURNEYS: dict[str, tuple[Callable[[], None], int]] = {
    "tickets.md": (make_tickets, 4),
    "align.md": (make_preferences, 4),
    "chat.md": (make_pairs, 5),
    "compare-methods.md": (make_photos, 3),
}
"""Page -> what makes its data, and how many commands it may take."""


@pytest.fixture
def journey(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each command of a page printed; the page's Python has run as well."""
    page: str = request.param
    make, limit = JOURNEYS[page]
    monkeypatch.chdir(tmp_path)
    make()
    text = (DOCS / page).read_text(encoding="utf-8")
    commands = [line for block in blocks(text, ("sh",)) for line in block.code.splitlines() if line.strip()]
    assert 0 < len(commands) <= limit
    printed = []
    for command in commands:
        name, *args = shlex.split(command)
        assert name == "kitout"
        result = CliRunner().invoke(app, args, input="the cat\n/quit\n")
        assert result.exit_code == 0, f"{command}\n{result.output}"
        printed.append(result.output)
    namespace = {"__name__": "__main__"}
    for block in blocks(text):
        exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
    return printed


@pytest.mark.parametrize("journey", ["tickets.md"], indirect=True)
def test_the_analyst_gets_answers_to_a_file(journey: list[str]) -> None:
    with Path("answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    dtype = kitout.load("runs/tickets").kit.dtype  # as training chose it here
    model = transformers.AutoModelForSequenceClassification.from_pretrained("minilm", num_labels=2, dtype=dtype)
    kit = kitout.attach(model.eval())
    kit.load("runs/tickets/adapter", name="mine")
    kit.use("mine")
    tokenizer = transformers.AutoTokenizer.from_pretrained("minilm")
    for row in rows:
        with torch.no_grad():
            logits = kit(**tokenizer(row["text"], return_tensors="pt")).logits
            shares = logits.float().softmax(-1)[0]
        assert row["label"] == ["bad", "good"][int(shares.argmax())]
        assert float(row["probability"]) == pytest.approx(
            float(shares.max()), abs=1e-4 if dtype == torch.float32 else 1e-2
        )
    assert any(label in journey[1] for label in ("good", "bad"))


@pytest.mark.parametrize("journey", ["chat.md"], indirect=True)
def test_the_engineer_gets_a_chat_and_a_merged_folder(journey: list[str]) -> None:
    assert "largest difference" in journey[-1]
    merged = transformers.AutoModelForCausalLM.from_pretrained("pirate-model").eval()
    predictor = kitout.load("runs/pirate", dtype="float32")
    batch = predictor.tokenizer("the cat", return_tensors="pt")
    with torch.no_grad():
        difference = merged(**batch).logits - predictor.kit(**batch).logits
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("journey", ["compare-methods.md"], indirect=True)
def test_the_researcher_gets_a_table_and_predictions(journey: list[str]) -> None:
    assert "vpt-deep" in journey[1]
    assert "adaptformer" in journey[1]
    first, second = (Path(folder, "report.html").read_bytes() for folder in ("comparison", "comparison-again"))
    assert first == second
    with Path("answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    predictor = kitout.load("runs/methods/adapter/adaptformer-s0")
    assert [row["label"] for row in rows] == [p.label for p in predictor(["new-photos/1.png", "new-photos/2.png"])]


@pytest.mark.slow
@pytest.mark.parametrize("journey", ["align.md"], indirect=True)
def test_two_stages_each_end_in_a_policy(journey: list[str]) -> None:
    for kind, printed in zip(("sft", "dpo", "reward", "ppo"), journey, strict=True):
        assert f"saved    runs/{kind}/adapter" in printed
    assert "computing the reference" in journey[1]
    assert Path("runs/ppo/value/adapter.safetensors").is_file()
    answers = Path("runs/ppo/completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert all("reward" in json.loads(line)["rewards"] for line in answers)
