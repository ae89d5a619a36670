"""(h) One training step of every method against the frozen model's floor, float32 and bfloat16, all with the same loss.

A step is forward, backward and AdamW over the adapter. The floor is forward and backward of the frozen model to its
embeddings, nothing trained and no optimizer, on as many tokens as the method makes of the text: a prompt's floor has p
more, in every row; a prefix adds keys alone, so its floor has the text. Text: SmolLM2-135M's shape, labels everywhere,
whole logits. Images: ViT-S/16's shape with a linear head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import SMOL, Line, Times, interleaved, smollm2
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import kitout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {"fp32": (2, 128), "bf16": (4, 256)}  # rows, tokens
LENGTH = 20  # of prompts and prefixes
TEXT = {
    "LoRA": kitout.LoRA(rank=8, targets="all-linear"),
    "DoRA": kitout.LoRA(rank=8, targets="all-linear", dora=True),
    "IA3": kitout.IA3(),
    "SSF": kitout.SSF(),
    "BitFit": kitout.BitFit(),
    "AdaptFormer": kitout.AdaptFormer(),
    "Houlsby": kitout.Houlsby(),
    "Pfeiffer": kitout.Pfeiffer(),
    "ParallelAdapter": kitout.ParallelAdapter(),
    "prompt": kitout.PromptTuning(length=LENGTH),
    "prefix": kitout.PrefixTuning(length=LENGTH),
}
IMAGES = {
    "VPT": kitout.VPT(length=10),
    "VPT-deep": kitout.VPT(length=10, deep=True),
    "ViT-AdaptFormer": kitout.AdaptFormer(),
    "ViT-SSF": kitout.SSF(),
    "ViT-BitFit": kitout.BitFit(),
}
LIMITS = {"DoRA": 1.35}
LIMIT = 1.10
Case = Callable[[], float]


def run(rounds: int = 5, layers: int | None = None) -> Iterator[Line]:
    """layers: of the model of texts; None for all."""
    for dtype in DTYPES:
        for cases, floors in (text_cases(dtype, layers), image_cases(dtype)):
            times = interleaved(cases, rounds)
            yield from lines(times, floors, dtype)


def lines(times: Times, floors: dict[str, str], dtype: str) -> Iterator[Line]:
    for name, floor in floors.items():
        limit, ratio = LIMITS.get(name, LIMIT), times.ratio(name, floor)
        detail = f"{times.best(name):.3f} s, floor {times.best(floor):.3f} s"
        label = f"{name} step, {dtype}, against its floor"
        yield Line(label, times.ratio_text(name, floor), f"<= {limit:.2f} x", ratio <= limit, detail)


def text_cases(
    dtype: str, layers: int | None = None, names: tuple[str, ...] = ()
) -> tuple[dict[str, Case], dict[str, str]]:
    """The steps by name, and the floor of each. layers, names: fewer, to look closer."""
    rows, tokens = SHAPES[dtype]
    base: Any = smollm2(DTYPES[dtype], layers or SMOL.num_hidden_layers)
    kit = kitout.attach(base).train()
    ids = torch.randint(0, base.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        result: Tensor = kit(input_ids=ids, labels=ids, use_cache=False).loss
        return result

    def floor(more: int) -> Case:
        wide = torch.cat((ids[:, :more], ids), 1)
        labels = wide.clone()
        labels[:, :more] = -100

        def run_once() -> float:
            kit.use(None)
            embedded = base.get_input_embeddings()(wide).detach().requires_grad_()
            value = base(inputs_embeds=embedded, labels=labels, use_cache=False).loss
            value.backward()
            return value.item()

        return run_once

    cases: dict[str, Case] = {"floor": floor(0)}
    methods = {name: method for name, method in TEXT.items() if not names or name in names}
    if "prompt" in methods:
        cases["floor + prompt"] = floor(LENGTH)
    cases |= steps(kit, methods, loss)
    return cases, {name: "floor + prompt" if name == "prompt" else "floor" for name in methods}


def image_cases(
    dtype: str, layers: int | None = None, names: tuple[str, ...] = ()
) -> tuple[dict[str, Case], dict[str, str]]:
    """The same for images."""
    config = ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=layers or 12, num_labels=10
    )
    torch.manual_seed(0)
    base: Any = ViTForImageClassification(config).to(DTYPES[dtype])
    kit = kitout.attach(base).train()
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 224, 224, generator=rng).to(DTYPES[dtype])
    labels = torch.randint(0, 10, (4,), generator=rng)

    def loss() -> Tensor:
        result: Tensor = kit(pixel_values=pixels, labels=labels).loss
        return result

    def floor(more: int) -> Case:
        def widened(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
            return torch.cat((embedded, embedded[:, :more]), 1).detach().requires_grad_()

        def run_once() -> float:
            kit.use(None)
            handle = base.vit.embeddings.register_forward_hook(widened)
            try:
                value = base(pixel_values=pixels, labels=labels).loss
            finally:
                handle.remove()
            value.backward()
            return value.item()

        return run_once

    cases: dict[str, Case] = {"floor": floor(0), "floor + VPT": floor(10)}
    methods = {name: method for name, method in IMAGES.items() if not names or name in names}
    cases |= steps(kit, methods, loss)
    return cases, {name: "floor + VPT" if name.startswith("VPT") else "floor" for name in methods}


def steps(kit: kitout.Kit, methods: dict[str, Any], loss: Callable[[], Tensor]) -> dict[str, Case]:
    """A training step of each method, all on one kit."""

    def step(name: str, method: Any) -> Case:
        adapter = kit.add(name, method, seed=0)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, fused=True)

        def run_once() -> float:
            kit.use(name)
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.item()

        return run_once

    return {name: step(name, method) for name, method in methods.items()}
