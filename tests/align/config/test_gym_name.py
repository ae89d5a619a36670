"""`gym:NAME` with settings and a number of prompts, and every way to write it wrong."""

from __future__ import annotations

import pytest

from kitout.align.config.gym_name import GymName, parse_gym
from kitout.errors import ConfigError


def test_settings_are_values_and_the_number_is_not_part_of_the_task() -> None:
    found = parse_gym('gym:x:a=2:b=0.5:c=true:d=[1,"y"]:e=words:f=null#30')
    assert found == GymName("x", {"a": 2, "b": 0.5, "c": True, "d": [1, "y"], "e": "words", "f": "null"})
    assert found.size == 30
    assert parse_gym("gym:x") == parse_gym("gym:x#5") == GymName("x")
    assert parse_gym("gym:x:a=1:b=2") == parse_gym("gym:x:b=2:a=1") != parse_gym("gym:x:a=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gym:", "names no task of reasoning-gym"),
        ("gym:../x", "names no task of reasoning-gym"),
        ("gym:x#many", "'many' is no number of prompts"),
        ("gym:x#0", "'0' is no number of prompts"),
        ("gym:x#", "'' is no number of prompts"),
        ("gym:x:a", "'a' is no setting=value: write as in gym:chain_sum or gym:chain_sum:max_terms=2:max_digits=2"),
        ("gym:x:a=", "'a=' is no setting=value"),
        ("gym:x?a=1", "names no task"),
        ("gym:x:a=1:a=2", "a is set twice"),
        ("gym:x:size=5", "size is set by data.train.limit: leave it out here"),
        ("gym:x:seed=5", "seed is set by data.seed"),
    ],
)
def test_every_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_gym(text)
    assert message in str(found.value)
