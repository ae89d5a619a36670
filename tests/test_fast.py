"""The switch KITOUT_FAST=off: no fast path runs, and the plain forms give the same outputs, gradients and scores."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, AdaptFormer, Kit, LoRA, Mix, Stack, fast
from kitout.align.objectives.shared_prompts import SharedPrompts
from kitout.data.encode.item import EncodedExample
from kitout.delta import Delta
from kitout.evaluate.ask import joined_rows
from kitout.evaluate.ask.cache_rows import can_share_prompts
from kitout.methods.deltas import fused_low_rank, low_rank, low_rank_rows
from kitout.route import Route
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.shared_beginning import SharedBeginning

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5], [7, 7, 8, 8, 9]])
ROUTES: dict[str, Route] = {
    "one": "a",
    "stack": Stack("a", "b"),
    "mix": Mix({"a": 0.5, "b": 0.25}),
    "rows": ("a", "a", "b", None),
    "rows of many": ("a", "b", "a", "b"),
    "bottleneck": "c",
    "scale": "d",
}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the run of CI that has the switch off."""
    monkeypatch.setattr(fast, "_enabled", True)


@pytest.fixture
def kit(tiny_llama: nn.Module) -> Kit:
    kit = kitout.attach(tiny_llama)
    for name, method in {"a": LoRA(rank=2), "b": LoRA(rank=3), "c": AdaptFormer(), "d": IA3()}.items():
        adapter = kit.add(name, method, seed=0)
        with torch.no_grad():
            for value in adapter.parameters():
                value.add_(torch.randn_like(value), alpha=0.1)
    return kit


def run(kit: Kit, route: Route, trains: bool) -> list[Tensor]:
    """The logits, and in training every gradient."""
    with kit.use(route), torch.set_grad_enabled(trains):
        logits = kit(input_ids=IDS).logits
        if not trains:
            return [logits]
        parameters = [p for name in kit.names for p in kit[name].parameters()]
        return [
            logits.detach(),
            *torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True, materialize_grads=True),
        ]


@pytest.fixture
def refused_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fast path of products fails where it is reached."""

    def refusing() -> Any:  # a function of its own for each: which class has a path is seen from it
        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("a fast path ran")

        return refuse

    classes, found = [Delta], []
    while classes:
        found.append(classes.pop())
        classes += found[-1].__subclasses__()
    for cls in found:
        for path in ("fused_linear", "fused_linears", "fused_rows", "forward_rows", "forward_", "join"):
            if path in vars(cls):
                own = refusing()
                monkeypatch.setattr(cls, path, own if path in ("fused_linear", "forward_") else classmethod(own))
    for module in (fused_low_rank, low_rank, low_rank_rows):
        for node in vars(module).values():
            if isinstance(node, type) and issubclass(node, torch.autograd.Function):
                monkeypatch.setattr(node, "forward", staticmethod(refusing()))


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_plain_forms_alone_give_the_same(kit: Kit, route: Route, trains: bool, request: pytest.FixtureRequest) -> None:
    expected = run(kit, route, trains)
    request.getfixturevalue("refused_paths")
    with fast.disabled():
        found = run(kit, route, trains)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=3e-6, rtol=1e-5)
    if "bottleneck" not in request.node.name and "scale" not in request.node.name:
        with pytest.raises(AssertionError, match="a fast path ran"):  # so what was refused is what runs otherwise
            run(kit, route, trains)


def test_a_compiled_route_is_not_kept_over_the_switch(kit: Kit) -> None:
    compiled = kit.state.compile(ROUTES["mix"])
    assert kit.state.compile(ROUTES["mix"]) is compiled
    with fast.disabled():
        assert kit.state.compile(ROUTES["mix"]) is not compiled


def test_no_shared_work(kit: Kit) -> None:
    """Of the loop, of evaluation and of alignment."""
    targets = torch.tensor([0, 1, 6]), torch.tensor([6, 7, 7])
    rows = [EncodedExample((1, 2, 3, 4, 5, 6, end), (*[-100] * 6, end), prompt_length=6) for end in (7, 8, 9)]

    def found() -> list[bool]:
        return [
            HeadLoss.choose(kit, ["a"], lambda: kit(input_ids=IDS), *targets).mode != "full",
            can_share_prompts(kit, ["a"]),
            bool(joined_rows.joins(kit, ("a", "b"), 4)),
            SharedPrompts.of(rows, torch.device("cpu")) is not None,
            SharedBeginning.of(rows, torch.device("cpu")) is not None,
        ]

    assert found() == [True] * 5
    with fast.disabled():
        assert found() == [False] * 5


@pytest.mark.parametrize("value", ["off", " OFF", "on", ""])
def test_the_environment_decides(value: str) -> None:
    code = "import kitout.fast, sys; sys.exit(kitout.fast.enabled())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, fast.VARIABLE: value}, check=False)
    assert bool(done.returncode) is (value.strip().lower() != "off")
