"""One pass for all roles gives what each role says by itself, whatever its method and wherever the padding stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout import IA3, Houlsby, Kit, LoRA, PrefixTuning, PromptTuning, Stack
from kitout.align import roles as module
from kitout.align.roles import roles
from kitout.align.scalar_head import head_path, scalar_head
from kitout.data.padding import pad
from kitout.errors import ConfigError, RouteError, UnknownAdapter
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch
from train.fixtures import add, kit_of, texts
from zoo import VOCAB, D

METHODS = {
    "LoRA": LoRA(rank=2, targets="all-linear"),
    "IA3": IA3(),
    "prefix": PrefixTuning(length=3),
    "prompt": PromptTuning(length=4),
    "Houlsby": Houlsby(width=6),
    "DoRA": LoRA(rank=2, dora=True, targets="attn.q mlp.down"),
}
WANTED = {"policy": "tokens", None: "tokens", "taste": "last", "value": "all"}
ROWS = texts(3, seed=4)


def kit_with(species: str, method: Any, dtype: torch.dtype = torch.float64, other: Any = METHODS["LoRA"]) -> Kit:
    """A policy, a reward and a value of one method, and one of another for the same rows."""
    kit = kit_of(species, dtype=dtype)
    path = head_path(kit)
    add(kit, "policy", method, seed=0)
    add(kit, "taste", method, {path: scalar_head(kit, 1)}, seed=1)
    add(kit, "value", method, {path: scalar_head(kit, 2)}, seed=2)
    add(kit, "other", other, seed=3)
    return kit


def batch_of(kit: Kit, side: str, rows: Sequence[Any] = ROWS) -> Batch:
    ids, mask = pad([row.input_ids for row in rows], 0, side, kit.device)  # type: ignore[arg-type]
    starts = [ids.shape[1] * r + (ids.shape[1] - row.length if side == "left" else 0) for r, row in enumerate(rows)]
    places = [(r, t) for r, row in enumerate(rows) for t, label in enumerate(row.labels) if t and label >= 0]
    positions = torch.tensor([starts[r] + t - 1 for r, t in places])
    labels = torch.tensor([rows[r].labels[t] for r, t in places])
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    return Batch(inputs, {"positions": positions, "labels": labels}, len(rows), int(mask.sum()))


@torch.no_grad()
def by_row(kit: Kit, role: Any, answer: str, rows: Sequence[Any] = ROWS) -> Tensor:
    """What the role says of each row by itself, read off the model's own output."""
    found = []
    for row in rows:
        with kit.use(role):
            output = kit(input_ids=torch.tensor([row.input_ids])).logits[0]
        targets = [t for t, label in enumerate(row.labels) if t and label >= 0]
        if answer == "tokens":
            found += [F.log_softmax(output[t - 1], -1)[row.labels[t]] for t in targets]
        else:
            found += [output[-1, 0]] if answer == "last" else [output[t - 1, 0] for t in targets]
    return torch.stack(found)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["f32", "f64"])
@pytest.mark.parametrize("species", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_joint_is_separate_is_each_row_alone(name: str, species: str, dtype: torch.dtype, tolerance: float) -> None:
    kit = kit_with(species, METHODS[name], dtype)
    wanted: Any = WANTED | {"other": "tokens"}
    expected = {role: by_row(kit, role, answer) for role, answer in wanted.items()}
    assert (expected["policy"] - expected[None]).abs().max() > 1e-3
    for side in ("left", "right"):
        for how in ("joint", "separate"):
            found = roles(kit, batch_of(kit, side), wanted, how)  # type: ignore[arg-type]
            assert list(found) == list(wanted)
            for role, values in expected.items():
                assert found[role].dtype == dtype
                torch.testing.assert_close(found[role], values, rtol=0, atol=tolerance)


def test_methods_of_all_kinds_share_a_pass() -> None:
    kit = kit_of("gpt2", dtype=torch.float64)
    wanted: dict[Any, Any] = {None: "tokens"}
    for i, (name, method) in enumerate(METHODS.items()):
        add(kit, name, method, {head_path(kit): scalar_head(kit, i)} if i % 2 else None, seed=i)
        wanted[name] = "last" if i % 2 else "tokens"
    wanted[Stack("LoRA", "IA3")] = "all"
    found = roles(kit, batch_of(kit, "left"), wanted, "joint")
    for role, answer in wanted.items():
        torch.testing.assert_close(found[role], by_row(kit, role, answer), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["joint", "separate"])
@pytest.mark.parametrize("mode", ["chunked", "selected", "full"])
def test_log_probabilities_are_those_that_training_computes(mode: Any, how: Any) -> None:
    """Else a policy that has not moved would have a ratio other than 1."""
    kit = kit_with("llama", METHODS["LoRA"], torch.float32)
    batch = batch_of(kit, "right")
    found = roles(kit, batch, {"policy": "tokens", None: "tokens"}, how)
    with kit.use("policy"):
        trained, _ = HeadLoss(kit, mode).log_probs(lambda: kit(**batch.inputs), *batch.targets.values())
    assert (found["policy"] - trained).abs().max() <= 1e-6


@pytest.mark.parametrize("how", ["joint", "separate"])
@pytest.mark.parametrize("change", ["lora", "replaced"])
@pytest.mark.parametrize("species", ["llama", "gpt2", "gemma2"])
def test_a_role_with_a_trained_output_head_goes_through_its_own(species: str, change: str, how: Any) -> None:
    kit = kit_with(species, METHODS["LoRA"])
    heads = {"lm_head": nn.Linear(D, VOCAB, dtype=torch.float64)} if change == "replaced" else None
    add(kit, "head", LoRA(rank=2, targets="attn.q" if heads else "attn.q head"), heads)
    wanted: Any = WANTED | {"head": "tokens"}
    found = roles(kit, batch_of(kit, "right"), wanted, how)
    for role, answer in wanted.items():
        if species != "gemma2" or answer == "tokens":  # its soft cap would reach the scalar in the model's own output
            torch.testing.assert_close(found[role], by_row(kit, role, answer), rtol=0, atol=1e-12)


def test_a_soft_cap_far_above_the_logits_is_found_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_with("gemma2", METHODS["IA3"])
    kit.config.final_logit_softcapping = 20.0
    passes = counted(kit, monkeypatch)
    for expected_passes in (2, 3):
        found = roles(kit, batch_of(kit, "right"), {"policy": "tokens", None: "tokens"}, "joint")
        assert len(passes) == expected_passes
        torch.testing.assert_close(found["policy"], by_row(kit, "policy", "tokens"), rtol=0, atol=1e-12)
        del passes[expected_passes:]


def counted(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each pass through the model's first block from now on."""
    passes: list[int] = []
    block = kit.base.get_submodule(kit.survey.blocks[0].path)
    block.register_forward_pre_hook(lambda _, args, kwargs: passes.append(len(args[0])), with_kwargs=True)
    return passes


def test_auto_shares_a_pass_where_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_with("llama", METHODS["IA3"])
    batch = batch_of(kit, "left")
    passes = counted(kit, monkeypatch)
    wanted: Any = WANTED
    roles(kit, batch, wanted)
    assert passes == [12]
    monkeypatch.setattr(module, "JOINT_TOKENS", batch.inputs["input_ids"].numel() - 1)
    roles(kit, batch, wanted)
    assert passes == [12, 3, 3, 3, 3]


def test_what_cannot_differ_by_row_runs_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_with("llama", METHODS["IA3"])
    passes = counted(kit, monkeypatch)
    compile_route = type(kit.state).compile

    def refuse_rows(state: Any, route: Any) -> Any:
        if isinstance(route, tuple):
            raise RouteError("rows cannot differ here")
        return compile_route(state, route)

    monkeypatch.setattr(type(kit.state), "compile", refuse_rows)
    wanted: Any = {"policy": "tokens", None: "tokens"}
    roles(kit, batch_of(kit, "left"), wanted)
    assert passes == [3, 3]
    with pytest.raises(RouteError, match="rows cannot differ here"):
        roles(kit, batch_of(kit, "left"), wanted, "joint")


@pytest.mark.parametrize("how", ["joint", "separate"])
def test_scoring_leaves_everything_as_it_was(how: Any) -> None:
    kit = kit_with("llama", LoRA(rank=2, targets="all-linear", dropout=0.5))
    expected = roles(kit, batch_of(kit, "right"), WANTED, how)  # type: ignore[arg-type]
    kit.train()
    kit["taste"].eval()
    for value in kit["policy"].parameters():
        value.grad = torch.ones_like(value)
    kit.use("other")
    modes = [m.training for m in (*kit.modules(), *kit.base.modules())]
    batch = batch_of(kit, "right")
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    state = torch.get_rng_state()
    found = roles(kit, batch, WANTED, how)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (*kit.modules(), *kit.base.modules())] == modes
    assert kit.active == "other"
    assert "forward" not in kit.base.get_output_embeddings().__dict__
    assert all(torch.equal(batch.inputs[k], v) for k, v in inputs.items() if isinstance(v, Tensor))
    assert all((value.grad == 1).all() for value in kit["policy"].parameters())
    for role, values in found.items():
        assert not values.requires_grad
        assert torch.equal(values, expected[role])  # no dropout


def test_a_batch_without_targets_has_no_log_probabilities() -> None:
    kit = kit_with("llama", METHODS["IA3"])
    batch = batch_of(kit, "left")
    none = torch.zeros(0, dtype=torch.long)
    batch = replace(batch, targets={"positions": none, "labels": none})
    found = roles(kit, batch, WANTED, "joint")  # type: ignore[arg-type]
    assert {role: len(values) for role, values in found.items()} == {"policy": 0, None: 0, "taste": 3, "value": 0}


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({}, ConfigError, "none asked"),
        ({"polcy": "tokens"}, UnknownAdapter, "did you mean 'policy'"),
        ({"policy": "token"}, ConfigError, "did you mean 'tokens'"),
        ({"policy": "last"}, RouteError, r"no scalar head: ask it for 'tokens', or kit\.add\(name, method, heads="),
        ({None: "all"}, RouteError, "no scalar head"),
        ({"taste": "tokens"}, RouteError, "gives 1 value per position, no logits of the vocabulary"),
        ({("policy", None): "tokens"}, RouteError, "cannot use"),
    ],
)
def test_what_is_refused(wanted: Any, error: type[Exception], message: str) -> None:
    kit = kit_with("llama", METHODS["IA3"])
    with pytest.raises(error, match=message):
        roles(kit, batch_of(kit, "left"), {None: "tokens"} | wanted if wanted else wanted)


def test_what_else_is_refused() -> None:
    kit = kit_with("llama", METHODS["IA3"])
    batch = batch_of(kit, "left")
    with pytest.raises(ConfigError, match="how='jont': did you mean 'joint'"):
        roles(kit, batch, {None: "tokens"}, "jont")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"packed, so write train\.packing=false"):
        roles(kit, replace(batch, num_examples=5), {None: "tokens"})
    with pytest.raises(ConfigError, match="encoder-decoder"):
        roles(kit_of("t5"), batch, {None: "tokens"})
