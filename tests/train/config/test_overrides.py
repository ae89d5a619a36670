"""Dotted names set in plain values, YAML as people mean it, and every error at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kitout import IA3, LoRA
from kitout.errors import ConfigError
from kitout.train.config import overrides, yaml_file


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1e3), (".5", 0.5), ("-3", -3), ("0x10", 16), ("null", None), ("~", None), ("", None),
        ("true", True), ("no", "no"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("'1e-4'", "1e-4"), ("[a, 1, 2e-3]", ["a", 1, 2e-3]), ("{text: body}", {"text": "body"}), ("a b", "a b"),
        ("*.jsonl", "*.jsonl"), ("@x", "@x"), ("C:\\data\\x.csv", "C:\\data\\x.csv"), ("x=y", "x=y"), ("ü", "ü"),
        ("%s", "%s"), (".inf", float("inf")), ("1e", "1e"), ("3.2.1", "3.2.1"), ("squad:plain", "squad:plain"),
    ],
)  # fmt: skip
def test_values(words: str, value: Any) -> None:
    name, found = overrides.parse_override(f"a.b={words}")
    assert name == "a.b"
    assert found == value
    assert type(found) is type(value)


def test_what_looks_like_an_override() -> None:
    assert all(map(overrides.is_override, ["train.lr=1", "method=IA3", "jobs.0.train.lr=1", "x="]))
    assert not any(map(overrides.is_override, ["run.yaml", "./a=b/run.yaml", "folder"]))
    for word in ("=x", "train.=3", "-x=3", "a-b=3", "trän=3", "train..lr=1"):
        assert overrides.is_override(word)
        with pytest.raises(ConfigError, match="a setting is written name=value"):
            overrides.parse_override(word)


@pytest.mark.parametrize(
    ("values", "name", "value", "result"),
    [
        ({}, "train.lr", 1, {"train": {"lr": 1}}),
        ({"train": None}, "train.lr", 1, {"train": {"lr": 1}}),
        ({"train": {"lr": 1, "x": 2}}, "train.lr", 3, {"train": {"lr": 3, "x": 2}}),
        ({"model": "m"}, "model.dtype", "f", {"model": {"name": "m", "dtype": "f"}}),
        ({"method": "IA3"}, "method.preset", "qkv", {"method": {"name": "IA3", "preset": "qkv"}}),
        ({}, "method.rank", 4, {"method": {"rank": 4}}),
        ({"method": {"name": "LoRA", "rank": 2}}, "method", "IA3", {"method": "IA3"}),
        ({"data": "d"}, "data.max_length", 9, {"data": {"train": "d", "max_length": 9}}),
        ({"data": "d"}, "data.train.limit", 9, {"data": {"train": {"path": "d", "limit": 9}}}),
        ({"data": {"train": ["d"]}}, "data.train.limit", 9, {"data": {"train": {"path": "d", "limit": 9}}}),
        ({"data": {"train": ["d", "e"]}}, "data.train.1.limit", 9,
         {"data": {"train": ["d", {"path": "e", "limit": 9}]}}),
        ({"jobs": [{"name": "a", "data": "d"}]}, "jobs.0.data.test", 0,
         {"jobs": [{"name": "a", "data": {"train": "d", "test": 0}}]}),
        ({"jobs": [{"name": "a"}, {"name": "b", "data": "d"}]}, "jobs.b.data.test", 0,
         {"jobs": [{"name": "a"}, {"name": "b", "data": {"train": "d", "test": 0}}]}),
        ({"jobs": [{"name": "1"}, {"name": "0"}]}, "jobs.0.x", 3, {"jobs": [{"name": "1", "x": 3}, {"name": "0"}]}),
        ({"stages": [{"kind": "sft"}, {"kind": "dpo"}]}, "stages.dpo.loss.beta", 3,
         {"stages": [{"kind": "sft"}, {"kind": "dpo", "loss": {"beta": 3}}]}),
    ],
)  # fmt: skip
def test_apply(values: dict[str, Any], name: str, value: Any, result: dict[str, Any]) -> None:
    before = yaml_file.to_yaml(values)
    assert overrides.apply_override(values, name, value) == result
    assert yaml_file.to_yaml(values) == before  # a copy


def test_the_later_wins_and_files_come_first(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d.csv\nmethod: {name: LoRA, rank: 2}\ntrain: {lr: 1e-4}\n")
    run = overrides.build_config(file, [])
    assert (run.train.lr, run.method) == (1e-4, LoRA(rank=2))
    run = overrides.build_config(file, ["train.lr=1", ("model.name", "1e-4"), "train.lr=2e-3", "method.alpha=4"])
    assert (run.train.lr, run.model.name, run.method) == (2e-3, "1e-4", LoRA(rank=2, alpha=4))
    assert overrides.build_config(file, ["method=IA3"]).method == IA3()
    assert overrides.build_config(None, ["model=m", "data=d", "method.rank=3"]).method == LoRA(rank=3)


def test_every_error_at_once() -> None:
    words = ["data=[1", "train.lr=x", "trian.lr=1", "model=m", "model.name.x.y=1", "jobs=[]", "jobs.0.name=a"]
    with pytest.raises(ConfigError) as error:
        overrides.build_config(None, words)
    message = str(error.value)
    for part in ("6 errors", "data=[1", "train.lr: expected a number", "did you mean 'train'", "data: is required"):
        assert part in message
    assert "model.name.x.y: model.name is 'm', which holds no settings" in message
    assert "jobs.0.name: there is no entry '0' (there are none)" in message


def test_a_list_needs_a_number() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is a list of 2; choose one, for example data\.train\.0"):
        overrides.apply_override({"data": {"train": ["a", "b"]}}, "data.train.limit", 3)
    with pytest.raises(ConfigError, match=r"there is no entry '2' \(there are 0 to 1\)"):
        overrides.apply_override({"data": {"train": ["a", "b"]}}, "data.train.2.limit", 3)
    jobs = {"jobs": [{"name": "a"}, {"name": "b"}, {"name": "b"}]}
    with pytest.raises(ConfigError, match=r"jobs is a list of 3; .* jobs\.0, or by name \(a, b, b\)"):
        overrides.apply_override(jobs, "jobs.c.x", 3)
    with pytest.raises(ConfigError, match=r"no entry 'b' \(there are 0 to 2: a, b, b\)"):
        overrides.apply_override(jobs, "jobs.b.x", 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [2\n", r"line 3, column 1.*expected"),
        (
            "train:\n  lr: 1\n  batch: 2\n  lr: 3\n",
            r'line 4, column 3: .*duplicate key "lr" with value "3" \(original value: "1"\)',
        ),
        ("- a\n- b\n", "must hold sections.*found a list"),
        ("just words", "must hold sections.*found a str"),
        ("# nothing\n", "is empty; `kitout train --example`"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4: could not determine a constructor"),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
        ("a: \x00", "not YAML"),
        ("\tx: 1", r"line 1, column 1.*cannot start any token"),
        ("a: " + "[" * 1500, "not YAML|line 1"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        yaml_file.read_yaml(file)
    assert str(error.value).startswith(str(file))


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").touch()
    with pytest.raises(ConfigError, match=r"is not there; beside it: my\.yaml"):
        yaml_file.read_yaml(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        yaml_file.read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("é: 1".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        yaml_file.read_yaml(tmp_path / "latin.yaml")


def test_what_is_written_is_read_back() -> None:
    words = [
        "1e-4",
        "1e5",
        "no",
        "true",
        "null",
        "~",
        "",
        "2024-01-01",
        "0o7",
        "09",
        "1.",
        "1_0",
        ":",
        "- x",
        "=",
        "<<",
    ]
    values = {"words": words, "numbers": [1e-5, 1e20, 3, -0.0, float("inf")], "none": None, "odd": "a: b\n#c\x1b é"}
    assert yaml_file.parse_yaml(yaml_file.to_yaml(values), "x") == values
    assert [type(v) for v in yaml_file.parse_yaml(yaml_file.to_yaml(values), "x")["numbers"]] == [
        float,
        float,
        int,
        float,
        float,
    ]


def test_anchors_work_and_merge_keys_too() -> None:
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n"
    assert yaml_file.parse_yaml(text, "x") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
