"""Small sets in the place of the built-in ones that the suites of forgetting are made of: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitout.evaluate.sets import suites
from kitout.evaluate.sets.suites import CHOICES
from tiny_models import jsonl


def use_tiny_suites(
    folder: Path, monkeypatch: pytest.MonkeyPatch, questions: int = 4, texts: int = 3, chats: int = 2
) -> None:
    """So many questions of each set, texts, and different first turns of chats."""
    rows = [
        {"question": f"q {i}?", "choices": ["the cat", "a dog", "today"][: 2 + i % 2], "answer": i % 2}
        for i in range(questions)
    ]
    turns = [
        {"messages": [{"role": "user", "content": f"hi {max(i, 1)}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(chats + 1)
    ]
    contents = dict.fromkeys(CHOICES, rows) | {"wiki": [{"text": f"the cat {i}"} for i in range(texts)], "chat": turns}
    for name, content in contents.items():
        (folder / name).mkdir(parents=True)
        jsonl(folder / name / "train.jsonl", content)
    monkeypatch.setattr(suites, "fetch_asset", lambda name, log: folder / name)
