"""What people type as targets, on every model of the zoo and for every method that takes targets."""

from __future__ import annotations

from functools import cache

import pytest

import kitout
from kitout import LoRA
from kitout.base.select import COMPOSITE_ROLES
from kitout.errors import KitoutError, TargetError
from kitout.method import Method, registered_methods
from zoo import EXTRA, ZOO

SPECIES = ZOO | EXTRA


@cache
def kit_of(species: str) -> kitout.Kit:
    return kitout.attach(SPECIES[species].build())


def takes_targets(method: type[Method]) -> bool:
    try:
        method(targets="*")
    except KitoutError:
        return False
    return True


@pytest.mark.parametrize("species", SPECIES)
def test_names_of_linears_mean_linears(species: str) -> None:
    """The value a sublayer ends with often has the path of a projection: no list of names may take it along."""
    kit = kit_of(species)
    linears = kit.sites("all-linear")
    names = dict.fromkeys(site.path.rpartition(".")[2] for site in linears)
    kit.add("a", LoRA(rank=2, targets=" ".join(names)))
    chosen = kit["a"].sites
    assert {s.path for s in chosen} >= {s.path for s in linears}
    assert not {s.role for s in chosen} & set(COMPOSITE_ROLES)
    kit.remove("a")
    for site in linears[:: max(1, len(linears) // 8)]:
        assert kit.sites("re:" + site.path.replace(".", "[.]")) == [site]
    first = next(iter(names))
    without = kit.sites(f"all-linear -{first}")
    assert [s.path for s in without] == [s.path for s in linears if s.path.rpartition(".")[2] != first]


@pytest.mark.parametrize("method", [m for m in registered_methods() if takes_targets(m)], ids=lambda m: m.__name__)
def test_every_method_can_leave_out(method: type[Method]) -> None:
    kit = kit_of("bart")
    words = method.default_targets
    everything = method(targets=words).sites(kit.survey)
    for exclusion in ("-re:.*[.]1[.].*", "-*.1.*"):
        rest = method(targets=f"{exclusion} {words}").sites(kit.survey)
        assert [s.key for s in rest if s.role != "norm"] == [
            s.key for s in everything if s.role != "norm" and ".1." not in s.path
        ]
        assert 0 < len(rest) < len(everything)
    with pytest.raises(TargetError, match="only exclusions"):
        method(targets="-lm_head").sites(kit.survey)
    with pytest.raises(TargetError, match="matches no"):
        method(targets=f"{words} -nonsense").sites(kit.survey)
