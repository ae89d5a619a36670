"""Every method's fast path in training against its plain form: outputs and all gradients, of both dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, SSF, AdaptFormer, BitFit, Houlsby, Kit, LoRA, ParallelAdapter, Pfeiffer, fast
from kitout.method import Method
from kitout.methods.deltas import dora, fused_affine, fused_bottleneck
from zoo import ZOO

METHODS: dict[str, Method] = {
    "DoRA": LoRA(rank=3, dora=True, targets="all-linear"),
    "DoRA and biases": LoRA(rank=3, dora=True, targets="all-linear", bias="all"),
    "IA3": IA3(),
    "SSF": SSF(std=0.3),
    "BitFit": BitFit(),
    "AdaptFormer": AdaptFormer(width=4, scale="learned"),
    "Houlsby": Houlsby(width=4, std=0.1),
    "Pfeiffer": Pfeiffer(width=4, std=0.1),
    "ParallelAdapter": ParallelAdapter(width=4, activation="silu"),
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5], [7, 7, 8, 8, 9]])
NODES = [
    *(fused_affine._ScaleShift, fused_affine._LinearScaleShift, fused_affine._LinearShift),
    fused_bottleneck._AddBottleneck,
]


def build(model: nn.Module, method: Method) -> Kit:
    kit = kitout.attach(model)
    adapter = kit.add("a", method, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    kit.use("a")
    return kit.train()


def step(kit: Kit, call: dict[str, Tensor]) -> list[Tensor]:
    """The logits and every gradient."""
    torch.manual_seed(0)  # of dropout
    logits = kit(**call).logits
    parameters = list(kit["a"].parameters())
    loss = logits.float().square().mean()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return [logits.detach().float(), *gradients]


def compare(kit: Kit, call: dict[str, Tensor], tolerance: float) -> None:
    found = step(kit, call)
    with fast.disabled():
        expected = step(kit, call)
    assert any(bool(value.any()) for value in expected[1:])
    largest = max(float(value.abs().max()) for value in expected[1:])
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == reference.dtype
        size = max(float(reference.abs().max()), 0.1 * largest)  # a gradient may be 0 but for rounding
        assert float((value - reference).abs().max()) <= tolerance * size


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the nodes that run, as they do."""
    ran: list[str] = []
    for node in NODES:

        def apply(*args: Any, node: Any = node, own: Any = node.apply) -> Any:
            ran.append(node.__name__)
            return own(*args)

        monkeypatch.setattr(node, "apply", apply)
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_training_step(name: str, dtype: torch.dtype, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = build(tiny_llama.to(dtype), METHODS[name])
    ran = counted(monkeypatch)
    compare(kit, {"input_ids": IDS}, 1e-5 if dtype == torch.float32 else 0.1)
    assert ran


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "autocast"])
@pytest.mark.parametrize("name", METHODS)
def test_checkpointing_and_autocast(name: str, how: str, tiny_llama: Any) -> None:
    if how == "autocast":
        kit = build(tiny_llama, METHODS[name])
        with torch.autocast("cpu", torch.bfloat16):
            compare(kit, {"input_ids": IDS}, 0.1)
        return
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    tiny_llama.enable_input_require_grads()
    compare(build(tiny_llama, METHODS[name]), {"input_ids": IDS}, 1e-5)


@pytest.mark.parametrize("name", ["SSF", "BitFit", "Houlsby", "AdaptFormer", "DoRA"])
def test_images(name: str) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compare(build(ZOO["vit"].build(), METHODS[name]), {"pixel_values": pixels}, 1e-5)


def test_the_norm_of_a_weight_follows_it() -> None:
    """What is kept of a frozen weight is not used once the weight has been written to."""
    w = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    assert torch.equal(dora.frozen_square(w, w.dtype), w.square().sum(1))
    with torch.no_grad():
        w.mul_(2)
    assert torch.equal(dora.frozen_square(w, w.dtype), w.square().sum(1))


@pytest.mark.parametrize("method", [LoRA(rank=3, targets="all-linear"), SSF(std=0.3), BitFit()], ids=repr)
def test_biases_that_the_caller_trains_as_well(method: Method) -> None:
    kit = build(ZOO["gpt-neox"].build(), method)
    biases = [p.requires_grad_() for name, p in kit.base.named_parameters() if name.endswith("bias")]
    found = torch.autograd.grad(kit(input_ids=IDS).logits.square().mean(), biases)
    with fast.disabled():
        expected = torch.autograd.grad(kit(input_ids=IDS).logits.square().mean(), biases)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("positions", [(), (1,), (2, 3)])
def test_a_scale_over_any_number_of_positions(positions: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    y, scale, shift = (torch.randn(*shape, 4, requires_grad=True) for shape in (positions, (), ()))
    x, w = torch.randn(*positions, 3, requires_grad=True), torch.randn(4, 3)
    pairs = [
        (fused_affine.scale_shift(y, scale, shift), y * scale + shift, y),
        (fused_affine.linear_scale_shift(x, w, None, scale, shift), x @ w.t() * scale + shift, x),
    ]
    for found, expected, value in pairs:
        grads, references = (torch.autograd.grad(each.sin().sum(), (value, scale, shift)) for each in (found, expected))
        for grad, reference in zip(grads, references, strict=True):
            torch.testing.assert_close(grad, reference)
