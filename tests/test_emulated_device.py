"""What a GPU would launch and wait for: an adapter adds no wait and no copy to the forwards of its base.

A host that waits for the device, or hands it a tensor, stops launching, and a small batch takes as long as its
launches (docs/design.md). Run by `make test-device`, on the emulated device alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import kitout
from emulated_device import NAME, counts
from kitout import Kit, LoRA
from kitout.methods.deltas import fusing
from laws.activate import activated, added, fresh_model, kit_of
from laws.cases import TRAINED, Case, name_of
from laws.test_04_rows import mixtures, rows_with, uneven
from zoo import DEVICE, ZOO, Specimen, out

if DEVICE != NAME:
    pytest.skip("for KITOUT_TEST_DEVICE=emulated, as in make test-device", allow_module_level=True)


def test_tensors_of_two_devices_do_not_meet() -> None:
    here, there = torch.ones(2), torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"same device|one device"):
        there + here
    with pytest.raises(RuntimeError, match=r"same device|one device"):
        torch.cat((there, here))
    assert (there + 1).tolist() == [2.0, 2.0]


def test_waits_copies_and_launches_are_counted() -> None:
    counts.reset()
    x = torch.ones(3).to(DEVICE)
    assert counts.copies.total() == 1
    (x * 2).sum().item()
    assert counts.launches == {"mul": 1, "sum": 1}
    assert counts.waits.total() == 1


def test_what_ours_asks_is_named_by_its_line() -> None:
    kit = kitout.attach(fresh_model(ZOO["llama"]))
    counts.reset()
    kit.add("a", LoRA(rank=2))
    assert any(" kitout.runtime.build_adapter:" in line for line in counts.copies)


def step(kit: Kit, batch: dict[str, Tensor]) -> None:
    out(kit(**batch)).float().square().mean().backward()


def asked(call: Callable[[], object]) -> Counter[str]:
    """Waits and copies of ours in a call that has been made before.

    But for what a prompt after a text's first token reads of the text: whether all begin alike.
    """
    call()
    call()
    counts.reset()
    call()
    both = counts.waits + counts.copies
    return Counter({k: n for k, n in both.items() if " kitout." in k and "prompt_prefill" not in k})


@pytest.mark.parametrize(("specimen", "case"), TRAINED, ids=name_of)
def test_a_training_step_asks_the_host_for_nothing(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(3, 0)
    with activated(kit, case, fresh=True):
        kit.train()
        assert not asked(lambda: step(kit, batch))


@mixtures
def test_rows_of_many_adapters_ask_the_host_for_nothing(specimen: Specimen, group: list[Case]) -> None:
    kit = kit_of(specimen)
    with added(kit, *group):
        rows = rows_with(group)
        batch = uneven(specimen, len(rows))
        with kit.use(rows):
            assert not asked(lambda: step(kit, batch))
            with torch.no_grad():
                assert not asked(lambda: kit(**batch))


def launches(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Of a step."""
    counts.reset()
    out(model(**batch)).float().square().mean().backward()
    return counts.launches.total()


def test_a_lora_step_launches_less_than_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, gradients included; and these are those of the products whose output is rounded first."""
    specimen = ZOO["llama"]
    model, batch = fresh_model(specimen).to(torch.bfloat16), specimen.batch(3, 0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    embed = model.get_input_embeddings()
    vectors = embed(batch["input_ids"]).detach().requires_grad_()
    floor = launches(model.requires_grad_(False), {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"]})
    of_peft = launches(get_peft_model(copy.deepcopy(model), config), batch)
    kit = kitout.attach(copy.deepcopy(model))
    adapter = kit.add("a", LoRA(rank=8, alpha=16, targets="all-linear"))
    with torch.no_grad():
        for value in adapter.parameters():
            value.normal_(0, 0.02)
    kit.use("a")
    launches(kit, batch)
    rounded = [value.grad.clone() for value in adapter.parameters() if value.grad is not None]
    kit.zero_grad()
    monkeypatch.setattr(fusing, "OUT_DTYPE_DEVICES", (NAME,))
    ours = launches(kit, batch)
    assert ours <= 0.82 * of_peft
    assert (ours - floor) / specimen.layers <= 41
    assert (of_peft - floor) / specimen.layers >= 85
    for before, value in zip(rounded, adapter.parameters(), strict=True):
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        assert (value.grad - before).norm() <= 0.01 * before.norm()
        assert not torch.equal(value.grad, before)
