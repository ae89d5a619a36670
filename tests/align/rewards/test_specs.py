"""What a config writes for rewards, and every way to write it wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kitout.align.rewards.specs import RewardSpec, parse_rewards
from kitout.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("runs/taste/adapter", "adapter", "taste"),
        ("/home/me/secret/adapters/taste/", "adapter", "taste"),
        ("adapter", "adapter", "adapter"),
        ("./taste", "adapter", "taste"),
        ("C:\\runs", "adapter", "C:\\runs"),
        ("m:f", "function", "m:f"),
        ("my_rewards:short", "function", "my_rewards:short"),
        ("pack.age._x:score", "function", "pack.age._x:score"),
        ("gym:chain_sum", "gym", "gym:chain_sum"),
        ("gym:chain_sum:max_terms=2", "gym", "gym:chain_sum"),
        ("judge", "stage", "judge"),
    ],
)
def test_every_kind(text: str, kind: str, name: str) -> None:
    (spec,) = parse_rewards(text, stages=["judge"])
    assert (spec.kind, spec.name, spec.text, spec.weight) == (kind, name, text, 1.0)
    assert spec.target == text.removeprefix("gym:")


def test_lists_and_weights_keep_their_order() -> None:
    specs = parse_rewards({"gym:chain_sum": 1, "m:f": -0.5, "runs/a/adapter": 2})
    assert [(s.kind, s.weight) for s in specs] == [("gym", 1.0), ("function", -0.5), ("adapter", 2.0)]
    assert (
        parse_rewards(["mine:f", "runs/a"])
        == (
            RewardSpec("function", "mine:f", "mine:f"),
            RewardSpec("adapter", "runs/a", "a"),
        )[:2]
    )


def test_folders_of_one_name_are_called_by_their_paths() -> None:
    assert [s.name for s in parse_rewards(["x/a/adapter", "y/a/adapter", "z/b"])] == ["x/a/adapter", "y/a/adapter", "b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "found int 3: write a reward adapter's folder, module:function or gym:NAME, a list"),
        (None, "found NoneType None"),
        ([], "it is empty"),
        ({}, "it is empty"),
        ("", "'' is empty or has spaces"),
        (" m:f", "has spaces around it"),
        ("gym:", "names no task of reasoning-gym: write as in gym:chain_sum"),
        ("gym:../x", "names no task"),
        ("my_rewards.py:score", "is a file: write the module's name as Python imports it, my_rewards:score"),
        ("code/my_rewards.py:score", "my_rewards:score"),
        (
            "module::f",
            "is neither a reward adapter's folder, module:function or gym:NAME: write as in my_rewards:score",
        ),
        (["m:f", 3], "found int 3 in it"),
        ({"m:f": "much"}, "the weight of 'm:f' is 'much', expected a finite number"),
        ({"m:f": True}, "the weight of 'm:f' is True"),
        ({"m:f": float("nan")}, "the weight of 'm:f' is nan"),
        ({"m:f": 0}, "all weights are 0"),
        (["m:f", "m:f"], "'m:f' is there 2 times: name it once, with a weight"),
    ],
)
def test_every_error(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_rewards(value)
    assert str(found.value).startswith("reward: ")
    assert message in str(found.value)


def test_all_errors_come_together() -> None:
    with pytest.raises(ConfigError, match="reward: 3 errors"):
        parse_rewards({"gym:": 1, "a.py:f": 1, "m:f": "x"})


def test_parsing_loads_no_torch() -> None:
    code = "import sys, kitout.align.rewards.specs; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
