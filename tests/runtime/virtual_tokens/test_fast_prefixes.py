"""Prefixes and prompts by their fast paths against the plain ones: steps, generation, and values that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import Kit, PrefixTuning, PromptTuning, Stack, fast
from kitout.method import Method
from kitout.runtime.virtual_tokens.prefix_kv import PrefixAttention

METHODS: dict[str, Method] = {
    "prefix": PrefixTuning(length=3),
    "encoded": PrefixTuning(length=3, encoder=4),
    "prompt": PromptTuning(length=3),
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


def build(model: nn.Module, method: Method) -> Kit:
    kit = kitout.attach(model)
    kit.add("a", method, seed=0)
    kit.use("a")
    return kit


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    found = run()
    with fast.disabled():
        return found, run()


@pytest.mark.parametrize("how", ["fp32", "bf16", "padded", "reentrant", "not reentrant", "autocast"])
@pytest.mark.parametrize("name", METHODS)
def test_a_training_step(name: str, how: str, tiny_llama: Any) -> None:
    if "reentrant" in how:
        tiny_llama.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        tiny_llama.enable_input_require_grads()
    kit = build(tiny_llama.to(torch.bfloat16 if how == "bf16" else torch.float32), METHODS[name]).train()
    call = {"input_ids": IDS} | ({"attention_mask": PADDED} if how == "padded" else {})

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            logits = kit(**call).logits[:, 2:]
        logits.float().square().mean().backward()
        gradients = [p.grad for p in kit["a"].parameters() if p.grad is not None]
        for p in kit["a"].parameters():
            p.grad = None
        return [logits.detach().float(), *gradients]

    tolerance = 0.1 if how in ("bf16", "autocast") else 1e-5
    for value, reference in zip(*both(run), strict=True):
        assert float((value - reference).abs().max()) <= tolerance * float(reference.abs().max())


@pytest.mark.parametrize("route", ["a", Stack("a", "b")], ids=["one", "stack"])
@pytest.mark.parametrize("name", METHODS)
def test_generation(name: str, route: Any, tiny_llama: nn.Module) -> None:
    """Also after the values have changed, for another batch, and in another dtype."""
    kit = build(tiny_llama, METHODS[name]).eval()
    kit.add("b", PrefixTuning(length=2), seed=1)
    kit.use(route)

    def run(rows: int = 3) -> Tensor:
        scores: Any = kit.generate(
            input_ids=IDS[:rows], attention_mask=PADDED[:rows], max_new_tokens=4, min_new_tokens=4, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(scores.logits).float()

    first = run()
    torch.testing.assert_close(first, both(run)[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for value in kit["a"].parameters():
            value.add_(torch.randn_like(value))
    found, expected = both(run)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, first)
    torch.testing.assert_close(*both(lambda: run(2)), atol=1e-5, rtol=1e-5)
    tiny_llama.to(torch.float64)
    torch.testing.assert_close(*both(run), atol=1e-5, rtol=1e-5)


def test_keys_are_put_together_once(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = build(tiny_llama, METHODS["encoded"]).eval()
    calls: list[int] = []
    own = PrefixAttention._extra
    monkeypatch.setattr(PrefixAttention, "_extra", lambda self, x: calls.append(1) or own(self, x))
    kit.generate(input_ids=IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(calls) == len(kit["a"].sites)
