"""What can and cannot be done while adapters are merged into the base, and what merging at half strength gives."""

from __future__ import annotations

import pytest
import torch

from kitout import IA3, SSF, BitFit, FullFineTuning, LoRA, Method
from kitout.errors import MergeStateError, NotMergeable, RouteError
from laws.activate import kit_with, run


def test_merged_while_merged_is_refused() -> None:
    kit, _ = kit_with("llama", a=LoRA(), b=LoRA())
    kit.merge("a")
    for name in ("a", "b"):
        with pytest.raises(MergeStateError, match="unmerge"):
            kit.merged_copy(name)
    with pytest.raises(MergeStateError):
        kit.strength("a", 0.5)
    with pytest.raises(MergeStateError):
        kit.to(torch.float64)


def test_training_while_merged_is_refused() -> None:
    kit, batch = kit_with("llama", a=LoRA())
    kit.merge("a")
    kit.train()
    with pytest.raises(MergeStateError, match="reach no adapter"):
        kit(**batch)
    kit.eval()
    kit(**batch)


def test_both_ends_of_one_module_at_half_strength_merge() -> None:
    kit, batch = kit_with("llama", i=IA3(targets="mlp.down in:mlp.down"))
    kit.strength("i", 0.5)
    with kit.use("i"):
        attached = run(kit, batch)
    kit.merge("i")
    assert torch.allclose(run(kit, batch), attached, atol=1e-5)


def test_removing_another_adapter_while_one_is_merged() -> None:
    kit, batch = kit_with("llama", a=LoRA(), b=LoRA(), c=IA3())
    kit.use("c")
    active = run(kit, batch)
    kit.merge("a")
    merged = run(kit, batch)
    kit.remove("b")
    assert kit.names == ["a", "c"]
    assert torch.equal(run(kit, batch), merged)
    with pytest.raises(MergeStateError, match=r"'a' is merged .*removing 'a'"):
        kit.remove("a")
    with pytest.raises(RouteError, match="'c' is active"):
        kit.remove("c")
    kit.unmerge()
    assert torch.equal(run(kit, batch), active)
    kit.remove("a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method", [LoRA(targets="attn.q"), LoRA(targets="attn.q", dora=True), IA3(), SSF(), BitFit(), FullFineTuning()]
)
def test_an_adapter_that_holds_nan_or_infinity(method: Method, value: float) -> None:
    kit, _ = kit_with("llama", a=method, good=LoRA())
    with torch.no_grad():
        next(kit["a"].parameters()).flatten()[1] = value
    for names in (("a",), ("good", "a")):
        for merge in (kit.merge, kit.merged_copy):
            with pytest.raises(NotMergeable, match="a holds NaN or infinity in model"):
                merge(*names)
    assert not kit.merged


def test_values_that_the_dtype_of_the_base_cannot_hold() -> None:
    kit, _ = kit_with("llama", a=LoRA(targets="attn.q"))
    kit.base.to(torch.float16)
    before = {key: value.clone() for key, value in kit.base.state_dict().items()}
    with torch.no_grad():
        for parameter in kit["a"].parameters():
            parameter.fill_(1e3)
    with pytest.raises(NotMergeable, match=r"attn\.q_proj.*more than torch.float16 can hold"):
        kit.merge("a")
    assert all(torch.equal(value, before[key]) for key, value in kit.base.state_dict().items())


def test_dora_over_rows_of_zeros() -> None:
    kit, batch = kit_with("llama")
    with torch.no_grad():
        kit.base.model.layers[0].self_attn.o_proj.weight[3] = 0
    adapter = kit.add("d", LoRA(rank=2, dora=True, targets="attn.o"), seed=0)
    with kit.use("d"):
        attached = run(kit, batch)
    kit.merge("d")
    assert torch.allclose(run(kit, batch), attached, atol=1e-5)
    assert not adapter.deltas["model/layers/0/self_attn/o_proj"].b.any()
