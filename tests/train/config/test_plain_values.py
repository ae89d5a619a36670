"""Aliases that stand for billions of values or for themselves, and other hostile settings: an error at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kitout.errors import ConfigError
from kitout.train.config import overrides, yaml_file
from kitout.train.config.load import load
from work import at_most

MINIMAL: dict[str, Any] = {"model": "m", "data": "d.jsonl"}
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
MERGED = "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}\n" for i in range(1, 30))

# Where a bomb may stand: every setting that is walked, compared, copied or shown.
PLACES = (
    *("model", "model.name", "model.dtype", "method", "method.name", "method.rank", "method.targets", "data.train"),
    *("data.train.0.columns", "data.labels", "data.chat_template_kwargs", "data.validation", "objective", "train"),
    *("train.lr", "output.report_to", "output.folder", "jobs", "jobs.0.name", "nonsense"),
)


def place(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    start = {**values, "model": {"name": "m"}, "data": {"train": [{"path": "d"}]}, "jobs": [{"name": "a"}]}
    return overrides.apply_override({**start, "method": {"name": "LoRA"}}, name, value)


def doubled(levels: int) -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize("name", PLACES)
def test_shared_values_are_refused_wherever_they_stand(name: str) -> None:
    with at_most(2_000_000), pytest.raises(ConfigError, match=r"every alias.*more than 100,000 values") as error:
        load(place(MINIMAL, name, doubled(20)))
    assert len(str(error.value)) < 1000
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="refers to itself"):
        load(place(MINIMAL, name, loop))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 values"),
        (MERGED, "more than 100,000 values"),
        ("a: &a [1, *a]", "refers to itself"),
        ("a: &a {b: *a}", "refers to itself"),
        ("a: &a {<<: *a}", "refers to itself"),
        ("[" * 5000, "more than 200 open brackets"),
        ("{a: " * 40 + "1" + "}" * 40, "nested more than 32 levels"),
        ("a: " + "1" * 5000, "not YAML that can be read"),
        ("x" * 150_001, "150,001 characters"),
    ],
)
def test_a_file_that_stands_for_more_than_it_holds(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with at_most(5_000_000), pytest.raises(ConfigError, match=message) as error:
        overrides.build_config(file, [])
    assert len(str(error.value)) < 1500
    if "*" in text:
        with pytest.raises(ConfigError, match=message):
            yaml_file.read_yaml(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": {"name": []}}, r"method.name: expected the name of a method, found \[\]"),
        ({"method": {"name": {}}}, "method.name: expected the name of a method"),
        ({"method": {"name": None}}, "method.name: expected the name of a method"),
        ({"method": {"name": "L" * 10_000}}, "there is no method"),
        ({"method": {"name": "LoRA", "rank": ["x" * 10_000]}}, "method.rank"),
        ({"objective": []}, "objective: expected"),
        ({"train": {"steps": 10**12}}, "train.steps: expected at most"),
        ({"train": {"seed": -1}}, "train.seed: expected 0 or more"),
        ({"data": {"train": "d", "max_length": 10**4000}}, "data.max_length"),
        ({"data": {"train": "d", "image_size": 10**6}}, "data.image_size"),
        ({"nonsense" * 1000: 1}, "there is no such setting"),
        ({f"x{i}": 1 for i in range(1000)}, r"1,000 errors(?s:.*)and 980 more errors"),
    ],
)
def test_a_hostile_setting_is_a_short_message(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(MINIMAL | values)
    assert len(str(error.value)) < 15_000


def test_an_override_of_endless_depth_or_number() -> None:
    with pytest.raises(ConfigError, match="a name of 5,000 parts"):
        overrides.apply_override(MINIMAL, ".".join("a" * 5000), 1)
    with pytest.raises(ConfigError, match="there is no entry"):
        overrides.apply_override({"jobs": [{"name": "a"}]}, "jobs." + "1" * 5000 + ".name", 1)
