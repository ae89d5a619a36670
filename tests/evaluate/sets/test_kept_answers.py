"""Answers of adapters are taken from where they are kept only if nothing they depend on has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import kitout
from kitout import IA3, LoRA, Mix
from kitout.evaluate.sets.evaluation_set import Asked
from kitout.evaluate.sets.kept_answers import route_answers
from zoo import ZOO, tokenizer_of


@dataclass
class NamedSet:
    """Answers with the route, and counts what it was asked."""

    digest: str = "d"
    name: str = "named"
    kind: str = "text"
    groups: tuple[str, ...] = ()
    shares_batches: bool = True
    asked: list[list[Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return 3

    def ask(self, asked: Asked, routes: Sequence[Any], on_progress: Any) -> list[Any]:
        self.asked.append(list(routes))
        return [[str(route), 0.1, None] for route in routes]

    def constant(self) -> None:
        return None

    def measures(self, answers: Any) -> dict[str, Any]:
        return {}


def asked_with(**methods: Any) -> Asked:
    torch.manual_seed(0)
    kit = kitout.attach(ZOO["llama"].build())
    for name, method in methods.items():
        kit.add(name, method, seed=1)
    return Asked(kit, tokenizer_of(ZOO["llama"]), 0)


def test_what_is_kept_is_not_asked_again(tmp_path: Path) -> None:
    asked, what, lines = asked_with(a=LoRA(), b=IA3()), NamedSet(), []
    routes: dict[str, Any] = {"a": "a", "mix": Mix({"a": 0.5, "b": 0.5})}
    first = route_answers(asked, what, routes, tmp_path)
    assert len(what.asked) == 1
    assert len(list(tmp_path.iterdir())) == 2
    assert route_answers(replace(asked), what, routes, tmp_path, log=lines.append) == first
    assert len(what.asked) == 1
    assert lines == [f"named: answers of a, mix are taken from {tmp_path}"]
    more = route_answers(replace(asked), what, {"b": "b", **routes}, tmp_path)
    assert what.asked[1:] == [["b"]]
    assert more[1:] == first
    alone = replace(what, shares_batches=False, digest="other", asked=[])
    route_answers(replace(asked), alone, {"b": "b", **routes}, tmp_path)
    assert [len(each) for each in alone.asked] == [1, 1, 1], "each is kept before the next is asked"
    route_answers(asked, what, routes, None)
    assert what.asked[-1] == list(routes.values()), "without a folder nothing is kept"


def test_other_adapters_data_and_settings_are_asked_anew(tmp_path: Path) -> None:
    asked, what = asked_with(a=LoRA()), NamedSet()

    def is_asked(now: Asked, own: NamedSet, route: Any = "a") -> bool:
        before = len(own.asked)
        route_answers(replace(now), own, {"a": route}, tmp_path)
        return len(own.asked) > before

    assert is_asked(asked, what)
    assert not is_asked(asked, what)
    assert not is_asked(asked_with(a=LoRA()), what), "the same adapter of another process"
    with torch.no_grad():
        next(asked.kit["a"].parameters()).view(-1)[0] += 1e-6
    assert is_asked(asked, what)
    asked.kit["a"].strength = 0.5
    assert is_asked(asked, what)
    assert is_asked(asked, what, Mix({"a": 0.7}))
    assert is_asked(asked, what, Mix({"a": 0.8}))
    assert is_asked(asked, replace(what, digest="other"))
    assert is_asked(replace(asked, max_new_tokens=3), what)
    assert is_asked(asked_with(a=LoRA(rank=4)), what)
    with torch.no_grad():
        asked.kit.base.lm_head.weight[3, 5] += 1e-6
    assert is_asked(asked, what)
    for file in tmp_path.iterdir():
        file.write_text("{broken", encoding="utf-8")
    assert is_asked(asked, what)
    assert not is_asked(asked, what)
