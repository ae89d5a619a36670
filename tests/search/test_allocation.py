"""Ranks under a budget: sums, limits, order, and that a kit takes them."""

from __future__ import annotations

import random

import pytest

import kitout
from kitout import LoRA
from kitout.errors import ConfigError
from kitout.search import allocate, signals
from kitout.search.allocation import CRITERIA, allocate_ranks
from kitout.signals.site_signals import Signals, SiteSignals
from signals.dense import batches_of, kit_of, loss


def made_up(num: int, seed: int, widths: tuple[int, ...] = (8, 24, 64)) -> Signals:
    rng = random.Random(seed)
    sites = {}
    for i in range(num):
        d_in, d_out = rng.choice(widths), rng.choice(widths)
        shares = sorted((rng.random() for _ in range(16)), reverse=True)
        path = f"blocks.{i}.linear"
        sites[path] = SiteSignals(
            path=path, word=path, role="attn.q", tower="blocks", layer=i, d_in=d_in, d_out=d_out,
            gradient_energy=10 ** rng.uniform(-9, 2), fisher_mass=1.0, num_positions=99,
            explained_variance=tuple(share / sum(shares) for share in shares[: min(16, d_in)]),
            weight_gradient=10 ** rng.uniform(-9, 2),
        )  # fmt: skip
    return Signals(sites, 1, {})


@pytest.mark.parametrize("by", CRITERIA)
def test_sums_reach_the_budget_within_one_rank(by: str) -> None:
    for seed in range(5):
        found = made_up(12, seed)
        full = sum(site.cost * site.max_rank for site in found.values())
        for budget in (150, 1000, 7777, full - 1, full, 2 * full):
            for min_rank, ratio in ((1, 2.0), (0, 1.0), (2, 4.0)):
                if budget < 2 * min(site.cost for site in found.values()):
                    continue
                ranks = allocate_ranks(found, budget, by, min_rank, ratio)
                total = sum(found[path].cost * rank for path, rank in ranks.items())
                assert total <= budget
                assert list(ranks) == list(found)
                assert all(0 <= rank <= found[path].max_rank for path, rank in ranks.items())
                assert all(rank == 0 or rank >= min(min_rank, found[path].max_rank) for path, rank in ranks.items())
                open_costs = [found[p].cost for p, rank in ranks.items() if 0 < rank < found[p].max_rank]
                assert total == full or budget - total < min(open_costs, default=budget), (seed, budget)
                assert allocate_ranks(found, budget, by, min_rank, ratio) == ranks


def test_more_important_sites_have_no_lower_rank() -> None:
    found = made_up(10, 3, widths=(24,))
    budget = 10 * 48 * 4
    for by, value in (("gradient", "gradient_energy"), ("gora", "weight_gradient")):
        ranks = allocate_ranks(found, budget, by)
        order = sorted(found, key=lambda path: getattr(found[path], value))
        assert [ranks[path] for path in order] == sorted(ranks.values())
        assert max(ranks.values()) <= 2 * 4
        assert min(ranks.values()) == 1
    assert set(allocate_ranks(found, budget, "uniform").values()) == {4}
    assert set(allocate_ranks(found, budget, "gradient", max_rank_ratio=1.0).values()) == {4}


def test_eva_takes_the_directions_that_explain_most() -> None:
    """With one rank for each site, and the rest by share: no direction left behind explains more than one taken."""
    found = made_up(8, 5, widths=(64,))
    ranks = allocate_ranks(found, 128 * 40, "eva", max_rank_ratio=100.0)
    taken = [found[p].explained_variance[j] for p, rank in ranks.items() for j in range(1, min(rank, 16))]
    left = [found[p].explained_variance[rank] for p, rank in ranks.items() if rank < 16]
    assert sum(ranks.values()) == 40
    assert min(taken) >= max(left)


def test_a_small_budget_leaves_the_least_important_out() -> None:
    found = made_up(10, 1, widths=(24,))
    ranks = allocate_ranks(found, 3 * 48, "gradient")
    best = sorted(found, key=lambda path: -found[path].gradient_energy)[:3]
    assert {path for path, rank in ranks.items() if rank} == set(best)
    assert sum(ranks.values()) == 3
    method = allocate(found, 3 * 48, by="gradient", dropout=0.1)
    assert method == LoRA(rank={path: 1 for path in found if path in best}, dropout=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "swin", "t5"])
def test_a_kit_takes_what_is_allocated(name: str) -> None:
    kit = kit_of(name)
    found = signals(kit, batches_of(name, num=2), loss)
    for by, budget in (("eva", 4000), ("gradient", 700), ("uniform", 900)):
        method = allocate(found, budget, by=by)
        kit.add("a", method)
        ranks = {site.path: kit["a"].delta(site).a.shape[0] for site in kit["a"].sites}
        assert ranks == {path: r for path, r in allocate_ranks(found, budget, by).items() if r}
        assert budget - max(site.cost for site in found.values()) < kit.num_parameters("a").trainable <= budget
        kit.remove("a")


@pytest.mark.parametrize("init", ["eva", "loraga"])
def test_no_rank_is_above_what_can_start(init: str) -> None:
    kit = kit_of("llama")
    found = signals(kit, batches_of("llama", num=1), loss, directions=4, loraga=4)
    method = allocate(found, 5000, by="gradient", max_rank_ratio=4.0, init=init)
    assert max(method.rank.values()) == 4 < max(allocate(found, 5000, by="gradient", max_rank_ratio=4.0).rank.values())
    kit.add("a", method, start=found)
    assert 5000 - max(site.cost for site in found.values()) < kit.num_parameters("a").trainable <= 5000


def test_a_path_that_ends_another_is_written_as_a_pattern() -> None:
    one = made_up(3, 0)
    sites = dict(one.items())
    path = "blocks.1.linear"
    fields = {name: getattr(sites[path], name) for name in SiteSignals.__dataclass_fields__}
    sites[path] = SiteSignals(**{**fields, "word": r"re:blocks\.1\.linear"})
    method = allocate(Signals(sites, 1, {}), 3000)
    assert r"re:blocks\.1\.linear" in method.rank
    assert method.targets.split() == list(method.rank)


def test_what_is_refused() -> None:
    found = made_up(4, 0)
    for match, call in {
        "none of eva, gora": lambda: allocate(found, 1000, by="magnitude"),
        "fewer than rank 1": lambda: allocate(found, 3),
        "max_rank_ratio at least 1": lambda: allocate(found, 1000, max_rank_ratio=0.5),
        "leave them out": lambda: allocate(found, 1000, targets="attn.q"),
    }.items():
        with pytest.raises(ConfigError, match=match):
            call()
    kit = kitout.attach(kit_of("llama").detach())
    plain = signals(kit, batches_of("llama", num=1), loss, directions=0)
    with pytest.raises(ConfigError, match="gora=True"):
        allocate(plain, 1000, by="gora")
    with pytest.raises(ConfigError, match="directions=32"):
        allocate(plain, 1000, by="eva")
