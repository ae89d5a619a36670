"""The chat: who answers, commands, what is kept; piped lines, Ctrl-C, and adapters that cannot chat."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from typer.testing import CliRunner, Result

import kitout
from kitout.cli import app
from kitout.data.read.sources import load_examples
from kitout.errors import ConfigError, KitoutError, PathError
from kitout.predict.conversation import Conversation, Piece
from kitout.predict.predictor import Predictor
from tiny_models import both, decoder, encoder
from zoo import DEVICE

pytest.importorskip("accelerate")


def saved(model: Path, auto: Any, out: Path, **heads: Any) -> Path:
    """Two adapters whose weights were drawn, not trained."""
    kit = kitout.attach(auto.from_pretrained(model).eval())
    for seed, name in enumerate(("first", "second")):
        kit.add(name, kitout.LoRA(rank=4), seed=seed)
        with torch.no_grad():
            for parameter in kit[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
        kit.save(name, out / name)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    return saved(decoder(root / "model"), transformers.AutoModelForCausalLM, root).parent / root.name


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    loaded = kitout.load(folder / "first", folder / "second", base=folder / "model", task="causal_lm", dtype="float32")
    loaded.kit.to(DEVICE)
    return loaded


@pytest.fixture
def conversation(predictor: Predictor) -> Conversation:
    return Conversation(predictor, max_new_tokens=6)


def answers(pieces: Iterator[Piece]) -> dict[str, str]:
    said: dict[str, str] = {}
    for piece in pieces:
        if piece.speaker:
            said[piece.speaker] = said.get(piece.speaker, "") + piece.text
    return said


def note(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces if not piece.speaker)


def test_it_remembers_until_reset(conversation: Conversation, predictor: Predictor) -> None:
    first = answers(conversation.say("the cat"))["first"]
    second = answers(conversation.say("the dog"))["first"]
    predictor.use("first")
    messages = [{"role": "user", "content": "the cat"}]
    assert predictor.chat(messages, max_new_tokens=6) == first
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "the dog"}]
    assert predictor.chat(messages, max_new_tokens=6) == second
    note(conversation.say("/reset"))
    assert answers(conversation.say("the cat"))["first"] == first
    assert len(conversation.examples()) == 2


def test_use_and_compare(conversation: Conversation, predictor: Predictor) -> None:
    assert note(conversation.say("/compare first second")) == "first and second answer"
    said = answers(conversation.say("the cat"))
    for name in ("first", "second"):
        predictor.use(name)
        assert predictor.chat("the cat", max_new_tokens=6) == said[name]
    assert said["first"] != said["second"]
    assert [chat["messages"][-1]["content"] for chat in conversation.examples()] == list(said.values())
    note(conversation.say("/use second"))
    assert list(answers(conversation.say("again"))) == ["second"]
    assert [turn["content"] for turn in conversation.histories["second"]][:3] == ["the cat", said["second"], "again"]
    note(conversation.say("/use base"))
    assert list(answers(conversation.say("x"))) == ["base"]
    assert predictor.kit.active is None
    for line, message in {
        "/use nobody": "there is no adapter 'nobody'", "/compare first": "two names", "/compare first third": "'third'",
        "/nothing": "there is no command /nothing", "/seed x": "takes a number", "/temperature -1": "temperature is -1",
        "/top_p 2": "from 0 to 1", "/tokens 0": "at least 1", "/save": "the name of a file",
    }.items():  # fmt: skip
        with pytest.raises(KitoutError, match=re.escape(message)):
            list(conversation.say(line))


def test_system_seed_and_sampling(conversation: Conversation, predictor: Predictor) -> None:
    note(conversation.say("/temperature 3"))
    note(conversation.say("/seed 5"))
    first = answers(conversation.say("the cat"))
    assert answers(conversation.say("the cat")) != first  # another seed for each answer
    note(conversation.say("/reset"))
    note(conversation.say("/seed 5"))
    assert answers(conversation.say("the cat")) == first
    note(conversation.say("/temperature 0"))
    note(conversation.say("/reset"))
    note(conversation.say("/system speak like a dog"))
    said = answers(conversation.say("the cat"))["first"]
    messages = [{"role": "system", "content": "speak like a dog"}, {"role": "user", "content": "the cat"}]
    predictor.use("first")
    assert predictor.chat(messages, max_new_tokens=6) == said
    assert "in use: first" in note(conversation.say("/help"))
    assert "at most 6 tokens" in note(conversation.say("/help"))


def test_what_is_saved_can_be_trained_on(conversation: Conversation, tmp_path: Path) -> None:
    note(conversation.say("/system be brief"))
    said = answers(conversation.say("the cat"))["first"]
    assert note(conversation.say(f"/save {tmp_path / 'chat.jsonl'}")).startswith("1 conversations in")
    (example,) = load_examples(tmp_path / "chat.jsonl").splits[""]
    assert [turn.text for turn in example.turns] == ["be brief", "the cat", said]
    with pytest.raises(ConfigError, match="exists already"):
        list(conversation.say(f"/save {tmp_path / 'chat.jsonl'}"))


def test_an_answer_that_is_stopped(conversation: Conversation, predictor: Predictor) -> None:
    conversation.max_new_tokens = 200
    pieces = conversation.say("the cat")
    while not (piece := next(pieces)).text:
        pass
    pieces.close()  # type: ignore[attr-defined]
    (question, answer) = conversation.histories["first"]
    assert (question["content"], answer["content"]) == ("the cat", piece.text)
    conversation.max_new_tokens = 3
    assert "cut after 3 tokens" in note(conversation.say("and now"))


def test_a_chat_that_is_too_long_says_so(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    from kitout.predict import predictor as module

    def check(*_: Any) -> None:
        raise ConfigError("prompt number 0 has 300 tokens, and the model reads 256: shorten it by 44")

    answers(conversation.say("the cat"))
    before = list(conversation.histories["first"])
    monkeypatch.setattr(module, "check_prompts", check)
    with pytest.raises(ConfigError, match="/reset"):
        list(conversation.say("the dog"))
    assert conversation.histories["first"] == before


def test_an_encoder_decoder_answers_each_line_alone(tmp_path: Path) -> None:
    saved(both(tmp_path / "model"), transformers.AutoModelForSeq2SeqLM, tmp_path)
    p = kitout.load(tmp_path / "first", base=tmp_path / "model", task="seq2seq_lm")
    conversation = Conversation(p, max_new_tokens=4)
    assert "answered alone" in conversation.remarks[0]
    said = [answers(conversation.say("the cat"))["first"] for _ in range(2)]
    assert said[0] == said[1] == p.chat("the cat", max_new_tokens=4)
    assert len(conversation.examples()) == sum(2 for text in said[:1] if text)


def chat(*args: object, lines: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, args)], input=lines)


def test_piped_lines(folder: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kitout, "load", lambda *_, **__: predictor)
    arguments = (folder / "first", folder / "second", "--max-new-tokens", 4)
    result = chat(*arguments, "--save", tmp_path / "s.jsonl", lines="the cat\n/use second\nthe dog\n")
    assert result.exit_code == 0, result.output
    predictor.use("first")
    first = predictor.chat("the cat", max_new_tokens=4)
    assert result.stdout.split("\n\n")[0] == first
    assert ">" not in result.stdout.replace(first, "")
    (row,) = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
    result = chat(*arguments, "--save", tmp_path / "s.jsonl", lines="again\n/use nobody\n/quit\nnot asked\n")
    assert result.exit_code == 1
    assert "there is no adapter 'nobody'" in result.stderr
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2  # what was there stays


def test_what_is_kept_survives_a_full_disk_another_chat_and_bytes_that_are_no_text(
    folder: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kitout, "load", lambda *_, **__: predictor)
    file, arguments = tmp_path / "s.jsonl", (folder / "first", "--max-new-tokens", 3)
    calls = []

    def full(self: Conversation, *args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise PathError("No space left on device")
        write(self, *args)  # type: ignore[arg-type]

    write = Conversation.save
    monkeypatch.setattr(Conversation, "save", full)
    result = chat(*arguments, "--save", file, lines="one\ntwo\nthree\n")
    assert result.exit_code == 1
    assert result.stderr.count("No space left on device") == 1
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"one", "two"} <= {turn["content"] for turn in row["messages"]}  # said while the disk was full, too
    assert len(calls) == 3
    with FileLock(tmp_path / ".s.jsonl.lock"):
        assert "another chat is writing it" in chat(*arguments, "--save", file, lines="x\n").output
    result = chat(*arguments, lines=b"hi \xff\nthe cat\n")
    assert "no UTF-8 text" in result.stderr
    assert result.stdout.strip() == predictor.chat("the cat", max_new_tokens=3)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "it is no UTF-8 text" in chat(*arguments, "--save", tmp_path / "bytes", lines="x\n").output


def test_text_of_a_model_cannot_act_on_the_terminal(
    folder: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kitout, "load", lambda *_, **__: predictor)
    monkeypatch.setattr(
        Conversation, "say", lambda *_: (Piece("first", t, t == "") for t in ("", "a\x1b[2J\u202e\x07"))
    )
    result = chat(folder / "first", lines="x\n")
    assert not set("\x1b\u202e\x07") & set(result.stdout)


def test_who_cannot_chat(folder: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(encoder(tmp_path / "model"))
    kit = kitout.attach(model.eval())
    kit.add("judge", kitout.LoRA(), seed=0)
    kit.save("judge", tmp_path / "judge")
    result = chat(tmp_path / "judge", "--model", tmp_path / "model", "--task", "classification")
    assert result.exit_code == 1
    assert "kitout predict" in result.output
    assert "--model MODEL" in chat().output
    assert "give task=" in chat(folder / "first", "--model", folder / "model").output
    assert "--task TASK" in chat(folder / "first", "--model", folder / "model").output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kitout", "chat", str(folder / "first"), "--model", str(folder / "model"),
               "--task", "causal_lm", "--max-new-tokens", "2000", "--save", str(tmp_path / "s.jsonl")]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("the cat\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate("/tokens 3\nthe dog\n", timeout=60)
    assert "Ctrl-C once more" in messages
    assert process.returncode == 0
    (row,) = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [turn["content"] for turn in row["messages"]][::2] == ["the cat", "the dog"]


def test_a_second_ctrl_c_ends_it(
    folder: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kitout, "load", lambda *_, **__: predictor)
    say = Conversation.say

    def interrupted(self: Conversation, line: str) -> Iterator[Piece]:
        yield from say(self, line)
        if line.startswith("stop"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "say", interrupted)
    arguments = (folder / "first", "--max-new-tokens", 4, "--save", tmp_path / "s.jsonl")
    assert chat(*arguments, lines="stop\nthe cat\nstop\nthe dog\n").exit_code == 0
    result = chat(*arguments, lines="stop\nstop\nnever asked\n")
    assert result.exit_code == 130
    text = (tmp_path / "s.jsonl").read_text()
    assert len(text.splitlines()) == 2
    assert "never asked" not in text
