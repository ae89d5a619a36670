"""What is kept of values follows them, whichever optimizer wrote them and whether or not it counts that."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

import kitout
from kitout import LoRA, PrefixTuning
from kitout.tensor_version import tensor_version, tensor_versions
from zoo import ZOO

WAYS: list[dict[str, Any]] = [{"fused": True}, {"foreach": True}, {"foreach": False}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_step_changes_it(options: dict[str, Any]) -> None:
    value = torch.nn.Parameter(torch.ones(3))
    value.grad = torch.ones(3)
    before, frozen = tensor_version(value), tensor_version(torch.ones(2), is_frozen=True)[1:]
    torch.optim.AdamW([value], **options).step()
    assert tensor_version(value) != before
    assert tensor_version(torch.ones(2), is_frozen=True)[1:] == frozen


def test_of_many_it_changes_with_each() -> None:
    values = [torch.ones(3), torch.nn.Parameter(torch.ones(2))]
    seen = [tensor_versions(values)]
    assert tensor_versions(values) == seen[0]
    values[0].add_(1)
    seen.append(tensor_versions(values))
    values[1].data = torch.ones(2)
    seen.append(tensor_versions(values))
    torch.optim.SGD([values[1]], lr=0.1).step()
    seen.append(tensor_versions(values))
    with torch.inference_mode():
        values[0] = torch.ones(3)
    seen += [tensor_versions(values), tensor_versions(values)]
    assert all(a != b for a, b in combinations(seen, 2))


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("method", [LoRA(rank=2), PrefixTuning(length=3)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("route", ["a", ["a", "b"]], ids=["one", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_after_a_step_has_the_new_values(
    method: kitout.Method, route: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Nothing that a forward before has kept is used again."""
    kit = kitout.attach(ZOO["llama"].build().to(dtype)).eval()
    for seed, name in enumerate("ab"):
        kit.add(name, method, seed=seed)
    ids = torch.arange(1, 9).view(2, 4)

    def logits() -> torch.Tensor:
        with kit.use(route), torch.no_grad():
            found: torch.Tensor = kit(input_ids=ids, use_cache=False).logits
        return found

    def loss() -> torch.Tensor:
        found: torch.Tensor = kit(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    before = logits()
    parameters = [value for name in "ab" for value in kit[name].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, **options)
    for _ in range(2):
        for name in "ab":
            with kit.use(name):
                loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits()
    assert not torch.equal(after, before)
    fresh = kitout.attach(ZOO["llama"].build().to(dtype)).eval()
    for name in "ab":
        fresh.add(name, method)
        fresh[name].load_state_dict(kit[name].state_dict())
    with fresh.use(route), torch.no_grad():
        torch.testing.assert_close(after, fresh(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("method", [LoRA(rank=2), PrefixTuning(length=3)], ids=lambda m: type(m).__name__)
def test_values_made_in_inference_mode_are_never_taken_for_unchanged(method: kitout.Method) -> None:
    """They count no writes."""
    kit = kitout.attach(ZOO["llama"].build()).eval()
    ids = torch.arange(1, 9).view(2, 4)
    with torch.inference_mode():
        for seed, name in enumerate("ab"):
            kit.add(name, method, seed=seed)
            for value in kit[name].parameters():
                value.add_(0.05)
        with kit.use(["a", "b"] if isinstance(method, LoRA) else "a"):
            for _ in range(2):
                before = kit(input_ids=ids, use_cache=False).logits
                for value in kit["a"].parameters():
                    value.mul_(2.0)
                assert not torch.equal(kit(input_ids=ids, use_cache=False).logits, before)
