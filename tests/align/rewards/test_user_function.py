"""The user's own function as a reward: found, called, and every way it can fail said with its own line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kitout.align.rewards.open_rewards import open_rewards
from kitout.align.rewards.reward import AnswerBatch, Reward
from kitout.align.rewards.specs import RewardSpec, parse_rewards
from kitout.align.rewards.user_function import import_function
from kitout.data.encode.item import EncodedExample
from kitout.errors import RewardError

CODE = """
import asyncio, sys
limit = 3
def count(prompts, completions, rows):
    return [len(set(c) & set(r["letters"])) for c, r in zip(completions, rows, strict=True)]
def changes(prompts, completions, rows):
    for row in rows: row['letters'].append('c'); row.clear()
    completions.clear(); prompts[0][0]['content'] = ''
    return [None, 1.0]
def fails(prompts, completions, rows):
    return [row["missing"] for row in rows]
def deep(prompts, completions, rows):
    return [int("x")]
async def later(prompts, completions, rows): ...
def two(completions, rows): ...
def more(prompts, completions, rows, *, extra=None): return [0.0, 0.0]
def leaves(prompts, completions, rows):
    sys.exit(3)
class Judge:
    def __init__(self, prompts, completions, rows): ...
"""
ANSWERS = AnswerBatch(["p", "q"], ["abc", "xyz"], [{"letters": "ab"}, {"letters": ""}], [EncodedExample((5,))] * 2)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text(CODE)
    (tmp_path / "broken_rewards.py").write_text("x = 1\nraise OSError('no such key')\n")
    (tmp_path / "wrong_rewards.py").write_text("def f(:\n    pass\n")
    (tmp_path / "needs_rewards.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "exits_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.endswith("_rewards") and not name.startswith("kitout")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_function_of_the_working_directory() -> None:
    before = list(sys.path)
    reward = import_function("own_rewards:count")
    assert sys.path == before
    assert reward.name == "own_rewards:count"
    assert reward.score(ANSWERS) == [2, 0]
    assert import_function("own_rewards:more").score(ANSWERS) == [0.0, 0.0]


def test_a_function_imports_from_its_folder_when_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_rewards.py").write_text(
        "def count(prompts, completions, rows):\n    import own_rewards\n"
        "    return own_rewards.count(prompts, completions, rows)\n"
    )
    reward = import_function("lazy_rewards:count")
    monkeypatch.chdir(tmp_path.parent)
    before = list(sys.path)
    assert reward.score(ANSWERS) == [2, 0]
    assert sys.path == before


def test_what_a_function_changes_stays_its_own() -> None:
    answers = replace(ANSWERS, prompts=[[{"content": "p"}], "q"], rows=[{"letters": ["a", "b"]}, {"letters": []}])
    assert import_function("own_rewards:changes").score(answers) == [None, 1.0]
    assert answers.completions == ["abc", "xyz"]
    assert answers.rows[0] == {"letters": ["a", "b"]}
    assert answers.prompts[0] == [{"content": "p"}]


def test_a_function_of_an_installed_package() -> None:
    with pytest.raises(RewardError, match=r"it is called as dumps\(prompts, completions, rows\), found dumps\(obj"):
        import_function("json:dumps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_rewards:f", "reward no_rewards:f: there is no module 'no_rewards' in {folder} or installed"),
        ("no_rewards.sub:f", "there is no module 'no_rewards' in"),
        ("own_rewards:cuont", "own_rewards.py has no function 'cuont'; did you mean 'count'"),
        ("own_rewards:limit", "limit is int, expected a function(prompts, completions, rows)"),
        ("own_rewards:later", "later is async: write a plain function"),
        ("own_rewards:two", "it is called as two(prompts, completions, rows), found two(completions, rows)"),
        (
            "broken_rewards:f",
            "importing broken_rewards raised OSError: no such key (broken_rewards.py, line 2: raise OSE",
        ),
        (
            "wrong_rewards:f",
            "importing wrong_rewards raised SyntaxError: invalid syntax (wrong_rewards.py, line 1: def f(:)",
        ),
        (
            "needs_rewards:f",
            "raised ModuleNotFoundError: No module named 'not_installed_anywhere' (needs_rewards.py, line 1",
        ),
        ("exits_rewards:f", "importing exits_rewards raised SystemExit: 0 (exits_rewards.py, line 2: sys.exit(0))"),
    ],
)
def test_what_cannot_be_imported_says_why(text: str, message: str, working_folder: Path) -> None:
    before = list(sys.path)
    with pytest.raises(RewardError) as found:
        import_function(text)
    assert message.replace("{folder}", str(working_folder)) in str(found.value)
    assert sys.path == before


def test_what_a_function_raises_names_it_and_its_line_and_is_chained() -> None:
    with pytest.raises(RewardError) as found:
        import_function("own_rewards:fails").score(ANSWERS)
    line = 'own_rewards.py, line 11: return [row["missing"] for row in rows]'
    assert str(found.value) == f"reward own_rewards:fails raised KeyError: 'missing' ({line})"
    assert isinstance(found.value.__cause__, KeyError)


def test_a_function_that_leaves_python_is_named() -> None:
    with pytest.raises(RewardError, match="reward own_rewards:leaves raised SystemExit: 3"):
        import_function("own_rewards:leaves").score(ANSWERS)


def no_model(spec: RewardSpec) -> Reward:
    raise RewardError(f"reward {spec.text}: there is no such folder")


def test_all_sources_are_opened_before_anything_is_said(working_folder: Path) -> None:
    rewards = open_rewards(parse_rewards({"own_rewards:count": 0.5}), no_model)
    assert rewards.score(ANSWERS).totals == (1.0, 0.0)
    with pytest.raises(RewardError) as found:
        open_rewards(parse_rewards(["own_rewards:nothing", "runs/none", "no_rewards:f"]), no_model)
    text = str(found.value)
    assert text.startswith("reward: 3 errors\n  - own_rewards:nothing: ")
    assert "\n  - runs/none: there is no such folder\n" in text
