"""Law 10: every site fires, and where one would not, adding raises instead of doing nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import BitFit, LoRA
from kitout.errors import UnusedSite
from laws.activate import activated, kit_of, run
from laws.cases import CELLS, Case, name_of
from zoo import Specimen

WAYS = (
    "forward", "forward_", "fold", "parameter_values", "key_values", "token_vectors", "combine", "mixing_weights",
)  # fmt: skip


@pytest.mark.parametrize(("specimen", "case"), CELLS, ids=name_of)
def test_every_delta_is_asked_in_one_forward(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    with activated(kit, case) as adapter:
        asked: Counter[str] = Counter()
        for site in adapter.sites:
            delta = adapter.delta(site)
            for way in WAYS:
                if hasattr(delta, way):
                    setattr(delta, way, counting(asked, site.key, getattr(delta, way)))
        run(kit, batch)
        assert set(asked) == {site.key for site in adapter.sites}


def counting(asked: Counter[str], key: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        asked[key] += 1
        return call(*args, **kwargs)

    return counted


def test_every_site_on_offer_is_a_module_that_runs(specimen: Specimen) -> None:
    kit, fired = kit_of(specimen), set[str]()
    modules = {s.path: s.module for s in kit.survey.sites if s.path not in kit.survey.unused and s.reader is None}
    hooks = [m.register_forward_pre_hook(lambda *_, p=p: fired.add(p)) for p, m in modules.items()]
    try:
        run(kit, specimen.batch(2, 0))
    finally:
        for hook in hooks:
            hook.remove()
    assert fired == set(modules)


class Block(nn.Module):
    """A linear that no forward calls, beside torch's own attention, which reads its output projection's weight."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.up, self.down, self.skipped = nn.Linear(d, 3 * d), nn.Linear(3 * d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


ROLES = {r"up$": "mlp.up", r"down$": "mlp.down", r"skipped$": "attn.q", r"out_proj$": "attn.o"}


def test_a_module_that_never_runs_is_refused_when_added() -> None:
    kit = kitout.attach(Tower(), roles=ROLES, example_batch={"x": torch.randn(2, 3, 8)})
    with pytest.raises(UnusedSite, match="skipped"):
        kit.add("a", LoRA(rank=2, targets="skipped"))
    assert kit.names == []
    kit.add("a", LoRA(rank=2, targets="mlp.*"))


def test_without_a_proof_the_first_forward_is_the_proof() -> None:
    kit = kitout.attach(Tower(), roles=ROLES)
    assert not kit.survey.proven
    kit.add("silent", LoRA(rank=2, targets="skipped"))
    kit.add("heard", BitFit(targets="mlp.up"))
    x = torch.randn(2, 3, 8)
    with kit.use("heard"):
        kit(x)
    with kit.use("silent"), pytest.raises(UnusedSite, match="skipped"):
        kit(x)
