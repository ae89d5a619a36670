"""The frozen trunk of texts: a step of LoRA on the last 4 of 30 blocks with what enters them kept, against without.

Steps of the training loop with its own loss, on texts of different lengths with a quarter of their tokens trained.
Recording is what the first epoch pays instead. Run alone: `python benchmarks/text_trunk.py [rounds] [dtypes]`.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import SMOL, Line, interleaved, smollm2

import kitout
from kitout import LoRA
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRunner
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.trunk import kept_inputs
from kitout.train.trunk.choose import choose_trunk

ROWS, LENGTHS, LAST = 8, (48, 80), 4
LIMIT, LOSS_LIMIT = 0.50, 1e-6  # of a step's time; of the loss in float32


def run(rounds: int = 8) -> list[Line]:
    return [line for dtype in (torch.float32, torch.bfloat16) for line in lines(dtype, rounds)]


def lines(dtype: torch.dtype, rounds: int) -> list[Line]:
    kit = kitout.attach(smollm2(dtype)).eval()
    kit.add("a", LoRA(rank=8, alpha=16, targets="all-linear", layers=f"last:{LAST}"), seed=0)
    kit["a"].train()
    items = texts(2 * ROWS)
    objective = CausalLM(kit)
    with kit.use("a"):
        objective.choose_head_loss(["a"], items)
    batches = [list(range(start, start + ROWS)) for start in (0, ROWS, 0, ROWS)]
    job = Job("a", objective, items, batches, TrainConfig(lr=1e-4, trunk="auto"))
    runner = StepRunner(kit, [job], ROWS)
    plain_loss = step(runner)
    with tempfile.TemporaryDirectory() as folder:
        choice = choose_trunk(kit, [job], [[]], folder=Path(folder), signature="", micro_batch_size=ROWS)
        if not choice.cuts:
            raise RuntimeError(choice.text)
        kept = kept_inputs._kept[kit]

        def whole() -> float:
            kept_inputs._kept.pop(kit, None)
            return step(runner)

        def recording() -> float:
            kept_inputs.keep(kit, kept)
            for slot in kept.store.slots.values():
                slot.values = None
            return step(runner)

        def with_trunk() -> float:
            kept_inputs.keep(kit, kept)
            return step(runner)

        cases: dict[str, Callable[[], object]] = {"whole": whole, "recording": recording, "kept": with_trunk}
        times = interleaved(cases, rounds)
        difference = abs(with_trunk() - plain_loss) / plain_loss
        kept_inputs.forget(kit)
    name = (
        f"{str(dtype)[6:]}, last {LAST} of {SMOL.num_hidden_layers} blocks, {ROWS} x {LENGTHS[0]}-{LENGTHS[1]} tokens"
    )
    ratio, exact = times.ratio("kept", "whole"), dtype != torch.float32 or difference <= LOSS_LIMIT
    detail = (
        f"whole {times.best('whole'):.3f} s, kept {times.best('kept'):.3f} s, the first epoch's step, which records, "
    )
    detail += f"{times.ratio_text('recording', 'whole')}; loss {difference:.1e} apart; chosen: {choice.text}"
    label = f"Step with a kept trunk against one without, {name}"
    target = f"<= {LIMIT:.2f} x" + (f", loss within {LOSS_LIMIT}" if dtype == torch.float32 else "")
    return [Line(label, times.ratio_text("kept", "whole"), target, ratio <= LIMIT and exact, detail)]


def step(runner: StepRunner) -> float:
    """One forward and backward of the first step; its loss."""
    rows = [(0, i) for i in runner.jobs[0].batches[0]]
    loss = runner.step(runner.kit, rows, 0, torch.Tensor.backward, lambda _model: contextlib.nullcontext())
    runner.kit["a"].zero_grad()
    return float(loss)


def texts(number: int) -> list[EncodedExample]:
    rng, examples = random.Random(0), []
    for _ in range(number):
        ids = tuple(rng.randrange(SMOL.vocab_size) for _ in range(rng.randint(*LENGTHS)))
        prompt = len(ids) - len(ids) // 4
        examples.append(EncodedExample(ids, (IGNORE_INDEX,) * prompt + ids[prompt:], prompt_length=prompt))
    return examples


if __name__ == "__main__":
    rounds, *dtypes = sys.argv[1:] or ["8"]
    for dtype in dtypes or ["float32", "bfloat16"]:
        for line in lines(getattr(torch, dtype), int(rounds)):
            print(f"{line.metric}: {line.measured} (asked {line.target}, {'yes' if line.reached else 'NO'})")
            print(f"  {line.detail}", flush=True)
