"""What can and cannot be done while adapters are merged into the base, and what merging at half strength gives."""

from __future__ import annotations

import pytest
import torch

from kitout import IA3, LoRA
from kitout.errors import MergeStateError
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
