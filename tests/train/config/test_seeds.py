"""train.seeds: which adapters a config describes, what its run.yaml holds, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kitout.errors import ConfigError
from kitout.train.config.load import load
from kitout.train.config.seeds import job_of, repeated_adapters

RUN: dict[str, Any] = {"model": "tiny", "data": "data.csv"}
JOBS = [{"name": "a"}, {"name": "b", "train": {"seed": 7}}, {"name": "c", "train": {"seeds": [5, 6], "lr": 0.1}}]


def adapters(config: Any) -> list[tuple[str, int]]:
    return [(run.output.name, run.train.seed) for run in config.per_job()]


def test_each_seed_is_an_adapter_of_its_own() -> None:
    assert adapters(load(RUN | {"train": {"seeds": [2, 0]}})) == [("adapter-s2", 2), ("adapter-s0", 0)]
    config = load(RUN | {"train": {"seeds": [0, 1], "epochs": 2}, "jobs": JOBS})
    assert adapters(config) == [("a-s0", 0), ("a-s1", 1), ("b", 7), ("c-s5", 5), ("c-s6", 6)]
    assert [run.train.epochs for run in config.per_job()] == [2] * 5
    assert config.seeds_by_job() == {"a": {"a-s0": 0, "a-s1": 1}, "c": {"c-s5": 5, "c-s6": 6}}
    assert repeated_adapters(config.seeds_by_job()) == {"a-s1", "c-s6"}
    assert [job_of(config.seeds_by_job(), name) for name in ("a-s1", "b")] == ["a", "b"]
    assert [run.output.name for run in config.without_seeds()] == ["a", "b", "c"]


def test_a_seed_apart_is_the_run_with_that_seed() -> None:
    first, second = load(RUN | {"train": {"seeds": [0, 3]}}).per_job()
    alone = load(RUN | {"train": {"seed": 3}, "output": {"name": "adapter-s3"}})
    assert second.to_dict() == alone.to_dict()
    assert first.to_dict() != second.to_dict()


def test_a_dump_loads_as_the_same_run() -> None:
    config = load(RUN | {"train": {"seeds": [0, 1]}, "jobs": JOBS})
    assert load(config.to_dict()) == config
    assert "seed" not in config.to_dict()["train"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"seeds": [0, 1], "seed": 3}}, "train.seeds: takes the place of seed, found seed=3 too"),
        ({"train": {"seeds": [1, 1]}}, "train.seeds: expected each seed once; found 1, 1"),
        ({"train": {"seeds": [-1]}}, "train.seeds.0: expected 0 or more, found -1"),
        ({"train": {"seeds": 3}}, "train.seeds: expected a list, found 3"),
        ({"train": {"seeds": [0]}, "jobs": [{"name": "a"}, {"name": "a-s0", "train": {"seed": 1}}]}, "share a name"),
        ({"train": {"seeds": [0]}, "jobs": [{"name": 127 * "a"}]}, "use 1 to 128 letters"),
    ],
)
def test_what_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(RUN | values)
    assert words in str(raised.value)
