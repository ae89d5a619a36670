"""Patterns over module paths mean what `re.fullmatch` means, and cannot take long."""

from __future__ import annotations

import re

import pytest

from kitout.base.path_patterns import MAX_PATTERN_CHARS, PathPattern
from kitout.errors import TargetError
from work import at_most

PATHS = [
    f"{root}layers.{i}.{name}"
    for root in ("model.", "model.language_model.", "vision_tower.encoder.", "")
    for i in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.experts.3.up", "norm1")
] + ["lm_head", "a.b-c.d", "q_proj", "a"]

PATTERNS = [
    ".*q_proj",
    r".*\.layers\.1\..*(up|down)_proj",
    r"^(?!.*(?:vision|visual)).*(?:q_proj|down_proj).*",
    r".*layers\.(?!0\.)\d+\..*_proj",
    r".*(?<!experts\.\d\.)up|.*(?<=self_attn\.)o_proj",
    r"(?:(?!mlp).)*",
    r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:\w+\.)+[a-n]\w*)",
    r"model.(layers|language_model)[.\w]+_proj$",
    r"[^.]*\.?[^.]*",
    r"(\w+\.)*(\w+_)?proj",
    r"(\w+\.){2,3}\w+",
    r".*\B_\b.*|\D*|.*?\d{2}\W.*",
    r"lm_head|a\.b\-c\.d",
    "a??a{1,2}?",
    "(a|)*",
    "q.proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_re_means(pattern: str) -> None:
    own, theirs = PathPattern(pattern), re.compile(pattern)
    assert [bool(own.matches(p)) for p in PATHS] == [theirs.fullmatch(p) is not None for p in PATHS]
    assert any(map(own.matches, PATHS))


@pytest.mark.parametrize(
    "key", ["q_proj", "layers.1.self_attn.q_proj", r"^model\..*v?_proj", "mlp.*", r"(self_)?attn\.\w+"]
)
def test_at_the_end_of_a_path_as_in_peft(key: str) -> None:
    own = PathPattern(key, at_end=True)
    assert [bool(own.matches(p)) for p in PATHS] == [bool(re.match(rf"(.*\.)?({key})$", p)) for p in PATHS]


@pytest.mark.parametrize(
    "pattern",
    [
        ".?" * 24 + "!",
        ".*" * 20 + "!",
        "(a|a)" * 40 + "!",
        "(((a*)*)*)*!",
        "(a+)+$!",
        "(?:" * 60 + "a" + ")*" * 60 + "!",
    ],
)
def test_a_hostile_pattern_ends(pattern: str) -> None:
    with at_most(2_000_000):
        for at_end in (False, True):
            own = PathPattern(pattern, at_end=at_end)
            assert not any(own.matches("a" * 60 + f".{i}" * 3) for i in range(40))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "not a regular expression"),
        ("a{" + "9" * 400 + "}", "not a regular expression"),
        ("(?:){4000000000}", "more complicated"),
        ("((?:a?){900}){900}", "more complicated"),
        ("(" * 1000 + ")" * 1000, "nested too deeply"),
        (r"(\w)\1", "groupref"),
        ("(?i)Q_proj", "flags"),
        ("(?i:Q)_proj", "flags"),
        (".*" * MAX_PATTERN_CHARS, "characters"),
    ],
)
def test_what_is_not_read_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        PathPattern(pattern)


def test_a_list_of_escaped_paths_may_be_long() -> None:
    paths = [f"model.layers.{i}.mlp-{i}.up" for i in range(500)]
    own = PathPattern("|".join(map(re.escape, paths)))
    assert all(map(own.matches, paths))
    assert not own.matches("model.layers.0.mlp_0.up")
