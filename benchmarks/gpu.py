"""(i) One GPU: the LoRA step in bf16 against PEFT and the floor, and decoding with many adapters by row.

Self-contained: a 1B-shaped Llama with random values. The floor is the frozen model's forward and backward to its
embeddings. Compiled: each block by itself, in all three. Decoding: one token for each of 64 rows, under 1,
8, 32 and 64 distinct LoRAs, against the same batch under one. Beside the wall time stands that of the kernels: where it
is much shorter, the GPU waits for the host's calls. Without a GPU nothing is measured; the tests run the small shapes
on a CPU, where the figures mean nothing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import Line, Times, interleaved
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import Kit, LoRA

RANK = 8
Kernels = dict[str, float]  # seconds of the kernels of one call, by case


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batches."""

    width: int = 2048
    """Of the residual stream; heads are 64 wide."""
    inner: int = 8192
    """Of the feed-forward."""
    blocks: int = 16
    """How many."""
    vocabulary: int = 32000
    """Tokens."""
    batches: tuple[tuple[int, int], ...] = ((8, 512), (16, 512))
    """Rows and tokens of a step; the first is compiled as well."""
    adapters: tuple[int, ...] = (1, 8, 32, 64)
    """Distinct adapters in a batch; the last is the number of rows."""

    def model(self, device: torch.device) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.blocks,
            num_attention_heads=self.width // 64, num_key_value_heads=max(1, self.width // 256),
            vocab_size=self.vocabulary, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with device:
            return LlamaForCausalLM(config).to(torch.bfloat16)


SMALL = Sizes(128, 256, 2, 256, ((2, 16), (3, 16)), (1, 2, 4))  # for the tests, on a CPU


def not_measured() -> str:
    """Why nothing can be measured here; "" where it can."""
    return "" if torch.cuda.is_available() else "torch sees no GPU here"


def run(rounds: int = 10) -> Iterator[Line]:
    yield from measure(torch.device("cuda"), Sizes(), rounds)


def measure(device: torch.device, sizes: Sizes, rounds: int, compiles: bool = True) -> Iterator[Line]:
    where = machine(device)
    for batch in sizes.batches:
        yield from step_lines(train(device, sizes, batch, rounds), batch, "eager", where)
    times, kernels = decode(device, sizes, rounds)
    for count in sizes.adapters[1:]:
        ratio = times.ratio(str(count), "1")
        metric = f"GPU: decoding {sizes.adapters[-1]} rows with {count} LoRAs by row, against one"
        detail = ", ".join(as_text(case, times, kernels) for case in ("base", "1", str(count))) + f"; {where}"
        yield Line(metric, times.ratio_text(str(count), "1"), "<= 1.50 x", ratio <= 1.5, detail)
    if compiles:
        batch = sizes.batches[0]
        yield from step_lines(train(device, sizes, batch, rounds, compiles=True), batch, "compiled by block", where)


def step_lines(measured: tuple[Times, Kernels], batch: tuple[int, int], how: str, where: str) -> Iterator[Line]:
    times, kernels = measured
    detail = ", ".join(as_text(case, times, kernels) for case in times.rounds) + f"; {where}"
    for to, limit in (("PEFT", 0.75), ("floor", 1.05)):
        ratio = times.ratio("kitout", to)
        of = "PEFT" if to == "PEFT" else "the floor"
        metric = f"GPU: LoRA r={RANK} all-linear step, {batch[0]} x {batch[1]} bf16, {how}, against {of}"
        yield Line(metric, times.ratio_text("kitout", to), f"<= {limit:.2f} x", ratio <= limit, detail)
        detail = ""


def as_text(case: str, times: Times, kernels: Kernels) -> str:
    of_kernels = f" ({kernels[case] * 1e3:.1f} of kernels)" if case in kernels else ""
    return f"{case} {times.best(case) * 1e3:.1f} ms{of_kernels}"


def machine(device: torch.device) -> str:
    """Device, driver and versions."""
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "not known"
    return (
        f"{torch.cuda.get_device_name(device)}, driver {driver}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def timed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call, finished: a GPU goes on after it returns."""

    def finished() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return finished


def measured(cases: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> tuple[Times, Kernels]:
    """Interleaved times, and what the kernels of one call of each take."""
    times = interleaved({name: timed(call, device) for name, call in cases.items()}, rounds, warm=3)
    if device.type != "cuda":
        return times, {}
    return times, {name: kernel_seconds(timed(call, device)) for name, call in cases.items()}


def kernel_seconds(call: Callable[[], object]) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
    on_device = (e for e in recorded.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(e.self_device_time_total for e in on_device) / 1e6


def compile_blocks(model: nn.Module) -> None:
    """Each block of a model without a kit by itself, as `kitout.compile` does."""
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            module.compile()


def train(
    device: torch.device, sizes: Sizes, batch: tuple[int, int], rounds: int, compiles: bool = False
) -> tuple[Times, Kernels]:
    ids = torch.randint(0, sizes.vocabulary, batch, generator=torch.Generator().manual_seed(0)).to(device)
    floor = sizes.model(device).requires_grad_(False).train()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(sizes.model(device), config).train()
    kit = kitout.attach(sizes.model(device)).train()
    kit.add("a", LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"))
    kit.use("a")
    if compiles:
        for model in (floor, peer):
            compile_blocks(model)
        kitout.compile(kit)
    embed = floor.get_input_embeddings()

    def of_floor() -> None:
        vectors = embed(ids).requires_grad_()
        floor(inputs_embeds=vectors, labels=ids, use_cache=False).loss.backward()

    def step(model: nn.Module) -> Callable[[], object]:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def call() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for parameter in parameters:
                parameter.grad = None

        return call

    cases = {"floor": of_floor, "PEFT": step(peer), "kitout": step(kit)}
    return measured(cases, device, rounds)


@torch.no_grad()
def decode(device: torch.device, sizes: Sizes, rounds: int) -> tuple[Times, Kernels]:
    rows = sizes.adapters[-1]
    base = sizes.model(device).eval()
    kit: Kit = kitout.attach(sizes.model(device)).eval()
    for i in range(rows):
        for value in kit.add(f"a{i}", LoRA(rank=RANK, targets="all-linear"), seed=i).parameters():
            value.normal_(0.0, 0.02)
    ids = torch.randint(0, sizes.vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0)).to(device)

    def under(count: int) -> Callable[[], object]:
        route = "a0" if count == 1 else tuple(f"a{i % count}" for i in range(rows))

        def call() -> None:
            kit.use(route)
            kit(input_ids=ids, use_cache=False)

        return call

    cases = {"base": lambda: base(input_ids=ids, use_cache=False)} | {str(n): under(n) for n in sizes.adapters}
    return measured(cases, device, rounds)
