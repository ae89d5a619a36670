"""LoRA(adaptive=True): AdaLoRA's scores and schedule, budgets kept to one triplet, and the plain LoRA it ends as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kitout
from kitout import LoRA
from kitout.errors import ConfigError
from kitout.fuse.lora.final_form import to_final_form
from kitout.methods.deltas.adaptive_rank import TripletImportance, budget_at, cut_to, last_cut_step, triplets_of
from train.fixtures import kit_of


def test_the_budget_is_the_cubic_schedule() -> None:
    """b_T + (b_0 - b_T)(1 - (t - t_i)/(T - t_i - t_f))^3 with t_i = T/10 and t_f = T/2."""
    assert [budget_at(t, 100, 1200, 800) for t in (1, 10, 50, 51, 100)] == [None, None, 800, 800, 800]
    for t in (11, 25, 49):
        assert budget_at(t, 100, 1200, 800) == pytest.approx(800 + 400 * (1 - (t - 10) / (100 - 10 - 50)) ** 3)
    assert [last_cut_step(n) for n in (1, 2, 3, 100)] == [1, 1, 2, 50]


def test_scores_are_those_of_the_formula() -> None:
    """With lambda_k as a parameter of its own: |lambda g| follows from B and its gradient alone."""
    torch.manual_seed(0)
    x, target = torch.randn(6, 5).double(), torch.randn(6, 7).double()
    a, b = nn.Parameter(torch.randn(3, 5).double()), nn.Parameter(torch.randn(7, 3).double())
    importance = TripletImportance(a, b).double()
    means: dict[str, Any] = dict.fromkeys("abl", 0.0)
    uncertainties: dict[str, Any] = dict.fromkeys("abl", 0.0)
    for _ in range(3):
        value = nn.Parameter(torch.ones(3).double())
        a.grad = b.grad = None
        (x @ a.T @ (b * value).T - target).square().mean().backward()
        importance.update(a, b)
        assert a.grad is not None
        assert b.grad is not None
        assert value.grad is not None
        found = {"a": (a * a.grad).abs(), "b": (b * b.grad).abs(), "l": (value * value.grad).abs()}
        for key, sensitivity in found.items():
            means[key] = 0.85 * means[key] + 0.15 * sensitivity.detach()
            uncertainties[key] = 0.85 * uncertainties[key] + 0.15 * (sensitivity.detach() - means[key]).abs()
        with torch.no_grad():
            a -= a.grad
            b -= b.grad
    s = {key: means[key] * uncertainties[key] for key in "abl"}
    torch.testing.assert_close(importance.scores(), s["l"] + s["a"].mean(1) + s["b"].mean(0), rtol=1e-12, atol=1e-15)


def test_the_lowest_scores_are_cut_and_stay_cut() -> None:
    one, two = (TripletImportance(torch.zeros(3, 2), torch.zeros(4, 3)) for _ in range(2))
    for importance, values in ((one, [3.0, 1.0, 5.0]), (two, [2.0, 6.0, 4.0])):
        importance.get_buffer("mean_value").copy_(torch.tensor(values))
        importance.get_buffer("uncertainty_value").fill_(1.0)
    cut_to([[(one, 6)], [(two, 10)]], 48.0)
    assert one.alive.all()
    assert two.alive.all()
    cut_to([[(one, 6)], [(two, 10)]], 40.0)
    assert one.alive.tolist() == [True, False, True]
    assert two.alive.tolist() == [False, True, True]
    one.get_buffer("mean_value")[1] = 100.0
    cut_to([[(one, 6)], [(two, 10)]], 26.0)
    assert one.alive.tolist() == [False, False, True]
    cut_to([[(one, 6), (two, 10)]], 16.0)
    assert two.alive.tolist() == [False, False, True], "sites of one module are cut together"


def trained(species: str, method: LoRA, steps: int = 6, bias: bool = False) -> Any:
    """An adapter that has had gradients of unequal size for some steps."""
    kit = kit_of(species)
    adapter = kit.add("a", method, seed=0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for number, value in enumerate(adapter.parameters()):
            value.grad = (1 + number % 5) * torch.randn(value.shape, generator=generator)
            with torch.no_grad():
                value.sub_(value.grad, alpha=0.01)
        adapter.after_step(step, steps)
    return kit, adapter


@pytest.mark.parametrize(
    ("species", "settings"),
    [
        ("llama", {}),
        ("llama", {"targets": "all-linear", "alpha": 3.0}),
        ("llama", {"rank": {"attn.*": 2, "mlp.*": 5}, "targets": "attn.* mlp.*", "rslora": True}),
        ("llama", {"targets": "attn.q mlp.*", "bias": "all", "lora_bias": True}),
        ("llama", {"rank": 1, "targets": "all-linear", "start": 2.0}),
        ("gpt2", {}),
        ("gpt2", {"rank": 1, "start": 3.0}),
        ("gpt2", {"targets": "embed mlp.*"}),
    ],
)
def test_it_ends_as_a_plain_lora_that_computes_the_same(species: str, settings: dict[str, Any], tmp_path: Path) -> None:
    method = LoRA(**{"rank": 4, "adaptive": True, **settings})
    kit, adapter = trained(species, method)
    fixed = kit_of(species)
    budget = fixed.add("f", LoRA(**{"rank": 4, **{k: v for k, v in settings.items() if k != "start"}})).method
    largest = max(s.d_in + s.d_out for s in adapter.sites) * 2
    sites_before = {site.path for site in adapter.sites}
    batch = {"input_ids": torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad(), kit.use("a"):
        before = kit(**batch).logits
    to_final_form(kit.state, "a")
    assert kit["a"] is adapter
    final = adapter.method
    assert isinstance(final, LoRA)
    assert not final.adaptive
    count, allowed = kit.num_parameters("a").trainable, fixed.num_parameters("f").trainable
    if settings.get("bias") != "all" and not (species == "gpt2" and settings.get("rank") == 1):
        assert allowed - largest < count <= allowed, budget
    with torch.no_grad(), kit.use("a"):
        torch.testing.assert_close(kit(**batch).logits, before, rtol=1e-5, atol=1e-5)
    kit.save("a", tmp_path / "a")
    again = kit_of(species)
    again.load(tmp_path / "a", name="b")
    assert again["b"].method == final
    with torch.no_grad(), kit.use("a"), again.use("b"):
        assert torch.equal(kit(**batch).logits, again(**batch).logits)
    assert {site.path for site in adapter.sites} <= sites_before
    kit.use(None)
    kit.merge("a")


def test_modules_of_rank_0_are_left_out_and_peft_has_the_ranks(tmp_path: Path) -> None:
    kit, adapter = trained("llama", LoRA(rank=1, targets="all-linear", adaptive=True, start=2.0))
    num_before = len(adapter.sites)
    to_final_form(kit.state, "a")
    assert len(adapter.sites) < num_before
    assert set(adapter.deltas) == {site.key for site in adapter.sites}
    kitout.save_peft(kit, "a", tmp_path / "peft")
    other = kit_of("llama")
    kitout.load_peft(other, tmp_path / "peft", "p")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), kit.use("a"), other.use("p"):
        torch.testing.assert_close(kit(input_ids=ids).logits, other(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_one_that_is_saved_in_between_goes_on(tmp_path: Path) -> None:
    kit = kit_of("llama")
    kit.add("a", LoRA(rank=2, adaptive=True), seed=0)
    kit.save("a", tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}
    again = kit_of("llama")
    adapter = again.load(tmp_path / "a")
    for value in adapter.parameters():
        value.grad = torch.ones_like(value)
    adapter.after_step(5, 6)
    assert sum(int(triplets_of(adapter.delta(s)).alive.sum()) for s in adapter.sites) == 2 * len(adapter.sites)


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"energy": 0.9, "rank": None}, {"start": 0.5}])
def test_what_does_not_fit_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoRA(**{"adaptive": True, **settings})
    with pytest.raises(ConfigError, match="adaptive=True begins with"):
        LoRA(start=2.0)


def test_a_plain_lora_is_written_as_before() -> None:
    assert {"adaptive", "start"}.isdisjoint(LoRA(rank=4).model_dump())
