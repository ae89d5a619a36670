"""Rows whose common beginning runs once get the losses and gradients of whole rows, or they run whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kitout
from kitout import IA3, Houlsby, Kit, LoRA, Mix, PrefixTuning, PromptTuning, Stack, fast
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import widened
from kitout.runtime.graphs.compile_blocks import remove_graphs
from kitout.train.loop.base_mode import training_mode
from kitout.train.measure.predict import predict
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.shared_beginning import BatchWithBeginning, SharedBeginning, shared_of
from kitout.train.setup.closed_answers import ClosedAnswers
from kitout.train.trunk.choose import choose_trunk
from kitout.train.trunk.kept_inputs import forget
from train.fixtures import add, causal, far, gradients, job, kit_of, losses, texts, trained, values

METHODS = {
    "LoRA": LoRA(rank=2, targets="all-linear"), "DoRA": LoRA(rank=2, dora=True), "IA3": IA3(),
    "Houlsby": Houlsby(width=6), "PrefixTuning": PrefixTuning(length=3),
}  # fmt: skip
BEGINNING = tuple(range(5, 16))
CPU = torch.device("cpu")


def with_beginning(number: int, seed: int = 0) -> list[EncodedExample]:
    """Texts after the same instruction; an untrained tail behind the target of every second one."""
    rows = []
    for k, row in enumerate(texts(number, seed)):
        tail = (9, 9) if k % 2 else ()
        labels = (*(IGNORE_INDEX for _ in BEGINNING), *row.labels, *(IGNORE_INDEX for _ in tail))
        rows.append(replace(row, input_ids=(*BEGINNING, *row.input_ids, *tail), labels=labels))
    return rows


def kit_with(method: str, species: str = "llama", attention: str = "eager", dtype: torch.dtype = torch.float32) -> Kit:
    kit = kit_of(species, attention, dtype)
    add(kit, "a", METHODS[method], seed=0)
    kit.train_only("a")
    return kit


def is_shared(objective: CausalLM, items: Sequence[EncodedExample]) -> bool:
    batch = objective.collate(items, [0] * len(items))
    return isinstance(batch, BatchWithBeginning) and shared_of(objective.kit, batch) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("species", "method"), [*(("llama", method) for method in METHODS), ("gpt2", "LoRA"), ("qwen3", "LoRA")]
)
def test_gradients_are_those_of_whole_rows(species: str, method: str, attention: str, dtype: torch.dtype) -> None:
    kit, items = kit_with(method, species, attention, dtype), with_beginning(8)
    objective = causal(kit, ["a"], items)
    jobs = [job("a", objective, items, batch=4)]
    assert is_shared(objective, items[:4])
    found = gradients(kit, jobs, micro=3)  # a row by itself is left over
    with fast.disabled():
        objective.shares_beginning = False
        reference = gradients(kit, jobs, micro=3)
    assert far(found, reference) <= (2e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_of_several_adapters_begin_once_for_each(attention: str) -> None:
    kit = kit_of("llama", attention)
    items = {name: with_beginning(8, seed) for seed, name in enumerate("abc")}
    for seed, rank in enumerate((4, 2, 3)):
        add(kit, "abc"[seed], LoRA(rank=rank, targets="all-linear"), seed=seed)
    items["b"] = [replace(row, input_ids=(60, *row.input_ids[1:])) for row in items["b"]]
    objective = causal(kit, list("abc"), items["a"])
    kit.train_only(*"abc")
    jobs = [job(name, objective, of_job, batch=2) for name, of_job in items.items()]
    with kit.use(tuple("aabbcc")):
        shared = shared_of(kit, objective.collate([row for of_job in items.values() for row in of_job[:2]], [0] * 6))
    assert shared is not None
    assert shared.inputs["input_ids"].shape[0] == 3
    found = gradients(kit, jobs, micro=6)
    with fast.disabled():
        reference = gradients(kit, jobs, micro=6)
    assert far(found, reference) <= 2e-6


def test_each_row_has_its_own_loss() -> None:
    kit, items = kit_with("LoRA"), with_beginning(5)
    objective, weights = causal(kit, ["a"], items), torch.rand(5)
    with kit.use("a"), torch.no_grad():
        found = objective.losses(kit, objective.collate(items, [0] * 5), weights)
        reference = objective.losses(kit, objective.collate(items, None), weights)
    for name in ("total", "per_example", "num_correct", "num_targets"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name))
    assert kit.config._attn_implementation == "eager"


def test_rows_that_run_whole() -> None:
    kit, items = kit_with("LoRA"), with_beginning(4)
    objective = causal(kit, ["a"], items)
    assert is_shared(objective, items)
    assert not is_shared(objective, items[:1])
    assert not is_shared(objective, texts(4))
    assert SharedBeginning.of([replace(row, labels=(IGNORE_INDEX,) * row.length) for row in items], CPU) is None
    with training_mode(kit, ["a"], activation_checkpointing=True):
        assert not is_shared(objective, items)
    with widened((32,)):  # train.pad_to
        assert not is_shared(objective, items)
    kitout.compile(kit)
    assert not is_shared(objective, items)
    remove_graphs(kit.state)
    assert is_shared(objective, items)
    add(kit, "b", METHODS["IA3"])
    for route, shares in ((("a", "a", "b", "b"), True), (("a", "a", "a", "b"), False), (("a", "b", "a", "b"), False)):
        with kit.use(route):
            assert is_shared(objective, items) == shares
    assert not isinstance(objective.collate(items, None), BatchWithBeginning)  # whoever looks on sees whole rows
    with fast.disabled():
        assert not causal(kit, ["a"], items).shares_beginning


def test_prompts_share_nothing() -> None:
    kit = kit_of("llama", "eager")
    add(kit, "a", PromptTuning(length=2))
    assert not causal(kit, ["a"], with_beginning(4)).shares_beginning


@pytest.mark.parametrize("options", [{"layers": "last:1"}, {"encoder": 4}], ids=["last block", "encoder"])
@pytest.mark.parametrize("species", ["llama", "gpt2"])
def test_behind_a_prefix(species: str, options: dict[str, Any]) -> None:
    kit, items = kit_of(species, "sdpa"), with_beginning(8)
    add(kit, "a", PrefixTuning(length=3, **options))
    kit.train_only("a")
    objective = causal(kit, ["a"], items)
    jobs = [job("a", objective, items, batch=4)]
    with kit.use("a"):
        assert is_shared(objective, items[:4])
    found = gradients(kit, jobs, micro=4)
    with fast.disabled():
        assert far(found, gradients(kit, jobs, micro=4)) <= 2e-6


def test_prefixes_of_several_adapters_share_nothing() -> None:
    kit, items = kit_of("llama", "eager"), with_beginning(4)
    for name, method in (("a", PrefixTuning(length=2)), ("b", PrefixTuning(length=3)), ("low", METHODS["LoRA"])):
        add(kit, name, method)
    objective = causal(kit, ["a"], items)
    for route in (Stack("a", "b"), Mix({"a": 0.5, "b": 0.5}), ("a", "b", "a", "b")):
        with kit.use(route):
            assert not is_shared(objective, items)
    assert objective.batch_key != causal(kit, ["low"], items).batch_key


def test_dropout_differs_from_row_to_row_in_training_alone() -> None:
    kit, items = kit_of("llama", "eager"), with_beginning(4)
    add(kit, "drops", LoRA(rank=2, dropout=0.1))
    add(kit, "a", METHODS["LoRA"])
    objective = causal(kit, ["drops", "a"], items)  # as jobs of one run
    with training_mode(kit, ["drops", "a"], False):
        for name, shares in (("drops", False), ("a", True)):
            with kit.use(name):
                assert is_shared(objective, items) == shares
    with kit.use("drops"):
        assert is_shared(objective, items)


@pytest.mark.parametrize("closed", [None, ClosedAnswers(("one", "two"), ((7,), (8,)), 2)], ids=["losses", "answers"])
def test_evaluations_share_it_as_well(closed: ClosedAnswers | None) -> None:
    kit, items = kit_with("LoRA"), with_beginning(6)
    items = [replace(row, prompt_length=len(BEGINNING)) for row in items]
    objective = causal(kit, ["a"], items)
    with kit.use("a"):
        assert is_shared(objective, items)
        found = predict(kit, objective, items, closed_answers=closed)
        with fast.disabled():
            expected = predict(kit, objective, items, closed_answers=closed)
    assert found.likeliest_answers == expected.likeliest_answers
    for one, other in zip(found.losses, expected.losses, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-6)
        assert (one.num_tokens, one.num_correct) == (other.num_tokens, other.num_correct)


@pytest.mark.parametrize("species", ["gemma3", "falcon", "mpt", "jamba"])
def test_models_that_see_less_or_keep_a_state_share_nothing(species: str) -> None:
    kit = kit_of(species)
    add(kit, "a", METHODS["LoRA"])
    assert not causal(kit, ["a"], with_beginning(4)).shares_beginning


def test_a_run_has_the_same_losses(tmp_path: Path) -> None:
    runs = {}
    for shares in (True, False):
        kit, items = kit_with("LoRA"), with_beginning(12)
        objective = causal(kit, ["a"], items)
        objective.shares_beginning = shares
        loop = trained(kit, [job("a", objective, items)], tmp_path / str(shares))
        runs[shares] = torch.tensor(losses(loop)), values(kit, "a"), loop.step_runner.tokens
    torch.testing.assert_close(runs[True][0], runs[False][0], rtol=1e-5, atol=1e-6)
    assert far(runs[True][1], runs[False][1]) <= 1e-3  # AdamW divides rounding by itself where gradients are near 0
    assert runs[True][2] == runs[False][2]


def test_behind_a_frozen_trunk_rows_are_whole(tmp_path: Path) -> None:
    kit, items = kit_of("llama", "eager"), with_beginning(6)
    add(kit, "a", LoRA(rank=2, layers="last:1"))
    kit.train_only("a")
    objective = causal(kit, ["a"], items)
    jobs = [job("a", objective, items, batch=3, trunk="auto")]
    reference = gradients(kit, jobs, micro=3)
    choice = choose_trunk(
        kit, jobs, [[]], folder=tmp_path, signature="", micro_batch_size=3, chosen="as when this run began"
    )
    try:
        assert choice.cuts
        assert objective.shares_beginning
        assert far(gradients(kit, jobs, micro=3), reference) <= 2e-6
    finally:
        forget(kit)
