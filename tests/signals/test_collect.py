"""What the probes see, against dense gradients and whole decompositions; and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch

import kitout
from kitout import LoRA
from kitout.base.weights import to_matrix
from kitout.errors import ConfigError, TargetError
from kitout.search import signals
from kitout.signals.collect import _groups_within
from signals.dense import batches_of, dense_gradients, inputs_at, kit_of, loss, modules_at
from zoo import ZOO


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_gradient_energy_is_that_of_the_dense_gradient(name: str) -> None:
    """The mean of 20 draws within 10 %, at every site; each draw within four of its standard deviations."""
    kit, batches = kit_of(name), batches_of(name)
    draws = [signals(kit, batches, loss, directions=0, seed=seed) for seed in range(20)]
    dense = dense_gradients(name, list(draws[0]), batches)
    assert len(dense) >= 14
    for path, gradient in dense.items():
        expected = gradient.square().sum().item()
        values = torch.tensor([draw[path].gradient_energy for draw in draws]) / expected
        assert values.mean() == pytest.approx(1.0, abs=0.1), path
        assert (values - 1).abs().max() < 4 * (2 / 32) ** 0.5
        assert draws[0][path].gradient_energy != draws[1][path].gradient_energy


def test_what_needs_the_whole_gradient_is_exact_in_any_number_of_passes() -> None:
    kit, batches = kit_of("bert"), batches_of("bert")
    calls: list[tuple[int, int]] = []
    whole = signals(kit, batches, loss, gora=True, loraga=3)
    in_parts = signals(
        kit, batches, loss, gora=True, loraga=3, gradient_bytes=20_000, on_batch=lambda *done: calls.append(done)
    )
    gradients, modules = dense_gradients("bert", list(whole), batches), modules_at("bert", list(whole))
    for path, gradient in gradients.items():
        expected = (to_matrix(modules[path], modules[path].weight.detach()) * gradient).abs().mean().item()
        assert whole[path].weight_gradient == pytest.approx(expected, rel=1e-4)
        assert in_parts[path].weight_gradient == whole[path].weight_gradient
        left, values, right = whole[path].gradient
        assert left.shape == (len(gradient), 6)
        torch.testing.assert_close(values, torch.linalg.svdvals(gradient)[:6], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(left.T @ gradient, values[:, None] * right, rtol=1e-3, atol=1e-6)
    assert calls[-1] == (len(calls), len(calls))
    assert len(calls) > 2 * len(batches)


def test_fisher_mass_is_the_sum_over_rows() -> None:
    """Row by row alone the gradient energies sum up to it; windows (swin) and 2-d inputs alike."""
    for name in ("llama", "swin"):
        kit, (batch, *_) = kit_of(name), batches_of(name)
        rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
        together = signals(kit, [batch], lambda kit, batch: 4 * loss(kit, batch), directions=0)
        alone = [signals(kit, [row], loss, directions=0) for row in rows]
        for path, site in together.items():
            assert site.fisher_mass == pytest.approx(sum(one[path].gradient_energy for one in alone), rel=1e-3), path


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_directions_are_those_of_a_full_svd(name: str) -> None:
    kit, batches = kit_of(name), batches_of(name, num=6)
    found = signals(kit, batches, loss, directions=8)
    for path in list(found)[::3]:
        x = inputs_at(name, path, batches).double()
        _, values, vectors = torch.linalg.svd(x, full_matrices=False)
        cosines = (found[path].directions.double() * vectors[:8]).sum(1).abs()
        assert cosines.min() >= 0.99, path
        expected = values.square() / values.square().sum()
        torch.testing.assert_close(
            torch.tensor(found[path].explained_variance).double(), expected[:8], rtol=0.02, atol=1e-5
        )


def test_only_trained_positions_count() -> None:
    kit, (batch, *_) = kit_of("llama"), batches_of("llama", rows=4)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    found = signals(kit, [{**batch, "labels": labels}])
    assert {site.num_positions for site in found.values()} == {int((labels != -100).sum())}
    path = next(iter(found))
    x = inputs_at("llama", path, [batch]).view(*labels.shape, -1)[labels != -100].double()
    cosines = (found[path].directions[:4].double() * torch.linalg.svd(x, full_matrices=False)[2][:4]).sum(1).abs()
    assert cosines.min() > 0.999


def test_nothing_is_left_behind() -> None:
    """Values, modes, gradients, the random state, the route and the adapters are as before; so is another adapter."""
    kit, batches = kit_of("bert"), batches_of("bert")
    kit.add("a", LoRA(rank=2), seed=0)
    kit.train()
    kit.base.get_submodule(kit.survey.blocks[0].path).eval()
    kit.use("a")
    loss(kit, batches[0]).backward()
    before = {name: value.clone() for name, value in [*kit.base.state_dict().items(), *kit.state_dict().items()]}
    gradients = [value.grad.clone() for value in kit["a"].parameters()]
    modes = [module.training for module in [*kit.base.modules(), *kit["a"].modules(), kit]]
    needs = [value.requires_grad for value in [*kit.base.parameters(), *kit.parameters()]]
    state = torch.get_rng_state()
    signals(kit, batches, loss, gora=True, loraga=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert kit.names == ["a"]
    assert kit.active is not None
    after = dict([*kit.base.state_dict().items(), *kit.state_dict().items()])
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [module.training for module in [*kit.base.modules(), *kit["a"].modules(), kit]] == modes
    assert [value.requires_grad for value in [*kit.base.parameters(), *kit.parameters()]] == needs
    assert all(value.grad is None for value in kit.base.parameters())
    assert all(torch.equal(value.grad, old) for value, old in zip(kit["a"].parameters(), gradients, strict=True))


def test_an_error_in_the_loss_leaves_nothing_behind() -> None:
    kit, batches = kit_of("llama"), batches_of("llama")

    def failing(_kit: kitout.Kit, _batch: object) -> torch.Tensor:
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        signals(kit, batches, failing)
    assert kit.names == []
    assert kit.active is None


def test_heads_are_copies() -> None:
    """A classifier of an adapter's own takes the place of the model's while the pass runs."""
    kit, batches = kit_of("bert"), batches_of("bert")
    path = next(site.path for site in kit.survey.sites if site.role == "head")
    head = torch.nn.Linear(kit.base.get_submodule(path).in_features, 3)
    head.requires_grad_(False)
    shapes = []

    def seen(kit: kitout.Kit, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = kit(**batch).logits
        shapes.append(logits.shape[-1])
        return logits.square().mean()

    found = signals(kit, batches, seen, heads={path: head})
    assert set(shapes) == {3}
    assert not head.weight.requires_grad
    assert head.weight.grad is None
    assert all(site.gradient_energy > 0 for site in found.values())


def test_what_is_refused() -> None:
    kit, batches = kit_of("llama"), batches_of("llama")
    for match, call in {
        "no batches": lambda: signals(kit, [], loss),
        "labels": lambda: signals(kit, batches),
        "a tensor of one number": lambda: signals(kit, batches, lambda kit, batch: kit(**batch).logits),
        "rank must be": lambda: signals(kit, batches, loss, rank=0),
    }.items():
        with pytest.raises(ConfigError, match=match):
            call()
    for targets in ("norm", "lm_head"):
        with pytest.raises(TargetError, match="no whole linear module of a block"):
            signals(kit, batches, loss, targets=targets)
    assert kit.names == []


def test_half_precision_and_shared_modules() -> None:
    """Sums are kept in float32; a module that runs twice in one forward has one gradient."""
    kit = kitout.attach(ZOO["llama"].build().to(torch.bfloat16))
    found = signals(kit, batches_of("llama"), loss)
    assert all(site.directions.dtype is torch.float32 and site.gradient_energy > 0 for site in found.values())


def test_groups_fit_the_memory() -> None:
    sites = kit_of("bert").sites("all-linear")
    groups = _groups_within(sites, 20_000)
    assert [site for group in groups for site in group] == sites
    assert all(len(group) == 1 or sum(4 * s.d_in * s.d_out for s in group) <= 20_000 for group in groups)
