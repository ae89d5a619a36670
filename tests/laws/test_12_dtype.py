"""Law 12: dtype and device follow the base.

Adapters are fp32 over a bf16 base unless asked otherwise, and fp64 over an fp64 one; outputs have the base's dtype,
whatever is active, merged or routed by row, and moving the kit moves the base with it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kitout
from kitout import Kit, LoRA
from laws.activate import (
    activated,
    add_parts,
    assert_same,
    far,
    fresh_kit,
    fresh_model,
    kit_of,
    loss_of,
    put_on,
    run,
    start_of,
    unmergeable,
)
from laws.cases import COSTLY, Case, experts, name_of
from zoo import ZOO, Specimen

cells = pytest.mark.parametrize(("specimen", "case"), [c for c in COSTLY if not experts(c[0])], ids=name_of)
# torch has no grouped product in fp64, which is how transformers computes experts
DTYPES = {torch.bfloat16: 0.2, torch.float64: 1e-4}  # how far from the fp32 outputs

TYPED = [(*cell, d) for d in DTYPES for cell in COSTLY if not (experts(cell[0]) and d is torch.float64)]


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize(("specimen", "case", "dtype"), TYPED, ids=lambda v: name_of(v) or str(v))
def test_outputs_keep_the_dtype_of_the_base(specimen: Specimen, case: Case, dtype: torch.dtype) -> None:
    plain = specimen.batch(3, 0)
    kit, batch = fresh_kit(specimen, dtype), cast(plain, dtype)
    add_parts(kit, case)
    adapter = kit.add("law", case.method, start=start_of(specimen.name, case.method))
    assert {p.dtype for p in adapter.parameters()} <= {torch.promote_types(dtype, torch.float32)}
    with activated(kit_of(specimen), case) as exactly:
        exact = run(kit_of(specimen), plain)
        adapter.load_state_dict(exactly.state_dict())
    with kit.use("law"):
        value = run(kit, batch)
        assert value.dtype == dtype
        assert value.isfinite().all()
        if case.trains:
            loss_of(kit(**batch)).backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in adapter.parameters())
    if not experts(specimen):  # rounding may send a token to another expert
        assert far(value.float(), exact.float()) <= DTYPES[dtype]
    if case.by_row(specimen):
        kit.add("other", LoRA(rank=2), seed=3)
        with kit.use(["law", None, "other"]):
            assert run(kit, batch).dtype == dtype
    if not unmergeable(adapter):
        kit.merge("law")
        assert {p.dtype for p in kit.base.parameters()} == {dtype}
        merged = run(kit, batch)
        assert merged.dtype == dtype
        if not experts(specimen):
            assert far(merged, value) <= (1e-5 if dtype is torch.float64 else DTYPES[dtype])


@cells
def test_moving_the_kit_moves_base_and_adapters(specimen: Specimen, case: Case) -> None:
    kit = fresh_kit(specimen)
    add_parts(kit, case)
    put_on(kit, case.method, start=start_of(specimen.name, case.method))
    assert kit.to(torch.float64) is kit
    assert kit.dtype == torch.float64
    everything = [*kit.base.parameters(), *kit.parameters()]
    assert {p.dtype for p in everything if p.is_floating_point()} == {torch.float64}
    batch = cast(specimen.batch(3, 0), torch.float64)
    with kit.use("law"):
        value = run(kit, batch)
    assert value.dtype == torch.float64
    with activated(kit_of(specimen), case):
        assert_same(value, run(kit_of(specimen), specimen.batch(3, 0)).double())
    if case.by_row(specimen):
        with kit.use(["law", None, "law"]):
            assert_same(run(kit, batch)[::2], value[::2])


def test_an_adapter_may_have_the_dtype_of_a_half_base() -> None:
    kit: Kit = kitout.attach(fresh_model(ZOO["llama"]).to(torch.bfloat16))
    adapter = kit.add("a", LoRA(), dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert kit.num_parameters("a").bytes == 2 * kit.num_parameters("a").total
