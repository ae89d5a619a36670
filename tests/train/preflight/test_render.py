"""The pre-flight page shows everything, in color and without, and no text from the data acts on the terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample, EncodedPair
from kitout.data.statistics import compute_statistics
from kitout.runtime.count import ParameterCount
from kitout.train.preflight.render import MAX_BAR_WIDTH, PreflightPage, bar, page_text, print_page, save_pages

HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]x[/bold] [/] :smile: \u202eback\x9b2J \r over \x00"


def item(masked: int, trained: int, location: str = "") -> EncodedExample:
    ids = tuple(range(masked + trained))
    return EncodedExample(ids, (IGNORE_INDEX,) * masked + ids[masked:], location=location)


PAGE = PreflightPage(
    settings={"model": "tiny", "method": "LoRA(rank=8)"},
    facts=compute_statistics({"train": [item(30, n, f"a.jsonl line {n}") for n in range(1, 60)], "test": [item(9, 3)]}),
    example=[("User: hi\nBot: ", False), ("hello", True), ("\n", False)],
    answer="",
    count=ParameterCount(1000, 1000, 10, 0.5, 4000, 990),
    sites=[("attn.q", "0-3", "8 -> 8", "4")],
    steps=12,
    memory=3 * 2**30,
    time=75.0,
    warnings=["lr is [high]"],
)


def colored(page: PreflightPage, width: int = 100) -> str:
    console = Console(force_terminal=True, color_system="truecolor", width=width, file=io.StringIO(), no_color=False)
    print_page(page, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_says_what_matters() -> None:
    text = page_text(PAGE)
    for part in (
        "tiny",
        "LoRA(rank=8)",
        "train",
        "59",
        "a.jsonl line 59",
        "attn.q",
        "0-3",
        "8 -> 8",
        "1,000 trainable parameters",
    ):
        assert part in text
    for part in ("12", "3.0 GiB", "1:15 min", "75 s"):
        assert (part in text) == (part != "1:15 min")
    assert "! " in text
    assert "lr is [high]" in text
    assert "█" in text


def test_without_color_there_are_brackets_and_no_escapes() -> None:
    text = page_text(PAGE)
    assert "User: hi\n Bot: «hello»" in text
    assert "«trained on»" in text
    assert "\x1b" not in text
    assert "\r" not in text


def test_brackets_are_never_in_the_text() -> None:
    page = replace(PAGE, example=[("a « b ⟧ c", False), ("say ❯ [[x]]", True)])
    assert "««say ❯ [[x]]»»" in page_text(page)


def test_with_color_the_text_is_unchanged() -> None:
    text = colored(PAGE)
    assert "\x1b[1;32mhello\x1b[0m" in text
    assert "«" not in text
    assert "\x1b[1;32mtrained on" in text


def test_no_color_gets_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    print_page(PAGE, console)
    assert isinstance(console.file, io.StringIO)
    assert "«hello»" in console.file.getvalue()


@pytest.mark.parametrize("color", [True, False])
def test_text_from_the_data_cannot_act(color: bool) -> None:
    parts = {"train": [item(3, 3, HOSTILE), EncodedExample((1,), (1,))]}
    page = replace(
        PAGE,
        facts=compute_statistics(parts),
        example=[(HOSTILE, False), (HOSTILE, True)],
        answer=HOSTILE,
        settings={"m": HOSTILE},
    )
    labels = replace(
        page, facts=compute_statistics({"train": [EncodedExample((1,), label=0)]}, [HOSTILE, "b"]), warnings=[HOSTILE]
    )
    plain, clean = colored(labels) if color else page_text(labels), colored(PAGE) if color else page_text(PAGE)
    assert "[bold]x[/bold] [/] :smile:" in plain
    assert "␛[31mred" in plain
    for sign in ("\x07", "\x9b", "\u202e", "\r", "\x00", "\x1b]", "\x1b[31m"):
        assert sign not in plain
    assert set(_codes(plain)) <= set(_codes(clean)) | {"\x1b[33m"}
    assert "\x07" not in (colored(page) if color else page_text(page))


def _codes(text: str) -> list[str]:
    return ["\x1b[" + part.split("m")[0] + "m" for part in text.split("\x1b[")[1:]]


def test_long_examples_lose_their_middle() -> None:
    page = replace(PAGE, example=[("x" * 9000, False), ("short answer", True), ("y" * 50, False)])
    text = page_text(page)
    assert "characters) ..." in " ".join(text.split())
    assert "«short answer»" in " ".join(text.split())
    assert len(text) < 6000
    many = replace(PAGE, example=[(f"turn {i} " * 9, i % 2 == 1) for i in range(200)])
    assert "more spans" in " ".join(page_text(many).split())


def test_labels_and_numbers() -> None:
    names = [f"class {i}" for i in range(30)]
    items = [EncodedExample((1, 2), label=i % 30 if i % 3 else 7) for i in range(300)]
    text = page_text(replace(PAGE, facts=compute_statistics({"train": items}, names), answer="class 7"))
    assert "class 7 " in text
    assert "and 18 more" in text
    assert "label: «class 7»" in text
    text = page_text(
        replace(PAGE, facts=compute_statistics({"train": [EncodedExample((1,), label=v) for v in (1.0, 2.0)]}))
    )
    assert "from 1 to 2, 1.5 on average" in text


def test_it_fits_narrow_terminals() -> None:
    for width in (40, 60, 200):
        console = Console(force_terminal=True, color_system=None, width=width, file=io.StringIO())
        print_page(PAGE, console)
        assert isinstance(console.file, io.StringIO)
        assert max(map(len, console.file.getvalue().split("\n"))) <= min(width, 100)


def test_saved(tmp_path: Path) -> None:
    save_pages([replace(PAGE, memory=None, time=float("nan"))], tmp_path)
    values = json.loads((tmp_path / "preflight.json").read_text())
    assert values["facts"]["parts"][0]["examples"] == 59
    assert values["count"]["trainable"] == 1000
    assert values["memory"] is values["time"] is None
    assert values["example"] == [["User: hi\nBot: ", False], ["hello", True], ["\n", False]]
    assert "«hello»" in (tmp_path / "preflight.txt").read_text()


def test_bars() -> None:
    assert [bar(n, 1000).rstrip() for n in (0, 1)] == ["", "▏"]
    assert bar(1000, 1000) == "█" * MAX_BAR_WIDTH
    assert all(len(bar(n, 1000)) == MAX_BAR_WIDTH for n in range(0, 1001, 7))


def test_pairs_show_both_answers_and_their_lengths(tmp_path: Path) -> None:
    pairs = [EncodedPair(item(5, n), item(5, 2 * n)) for n in range(1, 9)]
    facts = compute_statistics({"train": pairs}, num_dropped={"train": 2})
    page = replace(PAGE, facts=facts, rejected=[("User: hi\nBot: ", False), ("go away", True)])
    text = page_text(page)
    for title in ("chosen answers of the train split, in tokens", "rejected answers of the train split, in tokens",
                  "one example: the chosen answer", "its rejected answer"):  # fmt: skip
        assert title in text
    assert "Bot: «hello»" in text
    assert "Bot: «go away»" in text
    assert "dropped" in text
    save_pages([page, PAGE], tmp_path)
    with_pairs, plain = json.loads((tmp_path / "preflight.json").read_text())
    assert [of_name["name"] for of_name in with_pairs["facts"]["answers"]] == ["chosen", "rejected"]
    assert with_pairs["facts"]["parts"][0]["num_dropped"] == 2
    assert with_pairs["rejected"][1] == ["go away", True]
    assert "answers" not in plain["facts"]  # other pages have the keys they had
    assert "rejected" not in plain
    assert "num_dropped" not in plain["facts"]["parts"][0]
