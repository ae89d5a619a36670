"""Law 2: a fresh adapter is the identity where its method promises it, and is not where it does not.

Bit for bit, but for methods that renormalise or take off again what they add: those to rounding.
"""

from __future__ import annotations

import pytest
import torch

from laws.activate import activated, assert_same, kit_of, run
from laws.cases import CELLS, Case, name_of
from zoo import Specimen


@pytest.mark.parametrize(("specimen", "case"), CELLS, ids=name_of)
def test_a_fresh_adapter_is_the_identity(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    base = run(kit, batch)
    with activated(kit, case, fresh=True):
        fresh = run(kit, batch)
        kit.train()
        training = run(kit, batch)
    if not case.method.starts_as_identity:
        assert not torch.equal(fresh, base), "the method says it is not the identity at first, but it is"
        return
    for what, value in (("fresh", fresh), ("fresh, training", training)):
        assert_same(value, base, 1e-6 if case.rounds else 0.0, what)
