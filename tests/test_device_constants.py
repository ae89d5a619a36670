"""Numbers of a route as tensors: made once by values, device and dtype, usable in graphs, moved once."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kitout.device_constants import constant, on_device

CPU = torch.device("cpu")


def test_the_same_numbers_are_one_tensor() -> None:
    first = constant((1, 2), CPU, torch.long)
    assert constant((1, 2), CPU, torch.long) is first
    assert constant((True, 2), CPU, torch.bool).tolist() == [True, True]
    assert constant((1, 2), CPU, torch.float32).dtype == torch.float32
    assert constant(((1, 2), (3, 4)), CPU, torch.long).tolist() == [[1, 2], [3, 4]]


def test_what_inference_mode_has_made_may_enter_a_graph() -> None:
    with torch.inference_mode():
        scale = constant((0.25, 8.5), CPU, torch.float64)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (x * scale).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.25, 8.5]


def test_an_index_is_moved_once_for_each_device() -> None:
    index = torch.tensor([2, 0])
    assert on_device(index, CPU) is index
    meta = torch.device("meta")
    assert on_device(index, meta) is on_device(index, meta)
    assert on_device(index, meta).device == meta


def test_what_fake_tensors_and_vmap_are_given_is_not_kept() -> None:
    with FakeTensorMode():
        constant((7, 7), CPU, torch.long)
    assert torch.equal(constant((7, 7), CPU, torch.long), torch.tensor([7, 7]))
    x = torch.ones(3, 2)
    added = torch.func.vmap(lambda row: row + constant((5, 6), CPU, torch.float32))(x)
    assert torch.equal(added, x + torch.tensor([5.0, 6.0]))
    assert torch.equal(constant((5, 6), CPU, torch.float32) + x, added)
