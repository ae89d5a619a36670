"""Fusion by hand, where it sits, and its penalty in the loss of `kitout.train`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kitout import IA3, BitFit, Composition, Fusion, LoRA, Stack
from kitout.errors import RouteError
from kitout.train.loop.step import StepRunner
from laws.activate import assert_same, fresh_kit, kit_with, loss_of, put_on, run
from train.fixtures import causal, far, grads_of, job, no_sync, texts
from zoo import ZOO


@pytest.mark.parametrize("species", ["gpt2", "vit"])
def test_with_one_part_it_is_that_part(species: str) -> None:
    kit, batch = kit_with(species, a=LoRA(rank=2))
    kit.add("f", Fusion(of=("a",)))
    with kit.use("a"):
        want = run(kit, batch)
    with kit.use("f"):
        assert_same(run(kit, batch), want)


def test_it_is_its_formula() -> None:
    kit, _ = kit_with("llama", a=LoRA(rank=2, targets="attn.v"), b=IA3(targets="attn.v"))
    adapter = put_on(kit, Fusion(of=("a", "b")), "f")
    site = adapter.sites[0]
    module, delta = kit.base.get_submodule(site.path), adapter.delta(site)
    x = torch.randn(2, 5, site.d_in)
    with torch.no_grad():
        y = module(x)
        changes = []
        for name in ("a", "b"):
            with kit.use(name):
                changes.append(module(x) - y)
        query = y @ delta.query.T + delta.query_bias
        scores = torch.stack([(query * (change @ delta.key.T)).sum(-1) for change in changes])
        want = y + sum(p[..., None] * (a @ delta.value.T) for p, a in zip(scores.softmax(0), changes, strict=True))
        with kit.use("f"):
            assert_same(module(x), want)
    identity = torch.eye(site.d_out)
    penalty = sum(0.01 * (adapter.delta(s).value - identity).square().sum() for s in adapter.sites)
    assert_same(adapter.penalty(), penalty)
    assert kit["a"].penalty() is None


def test_it_sits_where_all_of_its_parts_act_on_an_output(tmp_path: Path) -> None:
    kit, batch = kit_with("gpt2", a=LoRA(rank=2, targets="attn.q attn.v"), b=IA3(targets="attn.v in:mlp.down"))
    adapter = put_on(kit, Fusion(of=("a", "b"), penalty=0.0), "f")
    assert {site.role for site in adapter.sites} == {"attn.v"}
    assert any(path.endswith("c_proj") for path in adapter.left_out)
    assert adapter.penalty() is None
    put_on(kit, BitFit(targets="mlp.up"), "c")
    with pytest.raises(RouteError, match=r"where all of a, c act on an output: a acts on attn\.q, attn\.v; c acts on"):
        kit.add("g", Fusion(of=("a", "c")))
    kit.add("ab", Composition(route=Stack("a", "b")))
    put_on(kit, Fusion(of=("f", "ab")), "g")
    with kit.use("g"):
        want = run(kit, batch)
    kit.save("g", tmp_path / "g")
    other = fresh_kit(ZOO["gpt2"])
    other.load(tmp_path / "g")
    with other.use("g"):
        assert torch.equal(run(other, batch), want)
        loss_of(other(**batch)).backward()
    assert all(p.grad is None for name in ("a", "b", "f") for p in other[name].parameters())


def test_its_penalty_joins_the_loss_once_per_step() -> None:
    kit, _ = kit_with("llama", a=LoRA(rank=2), b=LoRA(rank=2))
    put_on(kit, Fusion(of=("a", "b"), penalty=0.5), "f")
    items = texts(4)
    jobs = [job("f", causal(kit, ["f"], items), items)]
    gradients = {}

    def step(size: int) -> torch.Tensor:
        kit.zero_grad()
        rows = [(0, i) for i in jobs[0].batches[0]]
        loss = StepRunner(kit, jobs, size).step(kit, rows, 0, torch.Tensor.backward, no_sync)
        gradients[size] = grads_of(kit, jobs)
        return loss

    whole = step(4)
    assert_same(step(1), whole)
    assert far(gradients[1], gradients[4]) < 1e-5
    penalty = kit["f"].penalty()
    for site in kit["f"].sites:
        kit["f"].delta(site).penalty_factor = 0.0
    assert_same(whole, step(4) + penalty)
