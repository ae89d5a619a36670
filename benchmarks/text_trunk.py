"""The frozen trunk of texts: a step of LoRA on the last 4 of 30 blocks with what enters them kept, against without.

Steps of the training loop with its own loss, on texts of different lengths with a quarter of their tokens trained.
Recording is what the first epoch pays instead. And several adapters asked over the same texts, whose trunk is common.
Run alone: `python benchmarks/text_trunk.py [rounds] [float32] [bfloat16] [asked]`.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import SMOL, Line, interleaved, smollm2
from torch import Tensor

import kitout
from kitout import LoRA
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.evaluate.ask import joined_rows
from kitout.evaluate.ask.token_likelihood import Prompted, TokenScorer
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.jobs import Job
from kitout.train.loop.step import StepRunner
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.trunk import kept_inputs
from kitout.train.trunk.choose import choose_trunk

ROWS, LENGTHS, LAST = 8, (48, 80), 4
LIMIT, LOSS_LIMIT = 0.50, 1e-6  # of a step's time; of the loss in float32
ADAPTERS, ASK_LIMIT = 4, 0.60  # asked beside the base; of their time without a shared trunk


def run(rounds: int = 8) -> list[Line]:
    return [*(line for dtype in (torch.float32, torch.bfloat16) for line in lines(dtype, rounds)), *asked(rounds)]


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


def asked(rounds: int) -> list[Line]:
    """Log-likelihoods of the same texts under the base and several adapters, one after the other on each batch."""
    os.environ[joined_rows.VARIABLE] = "0"
    kit = kitout.attach(smollm2(torch.float32)).eval()
    names = [f"a{i}" for i in range(ADAPTERS)]
    for seed, name in enumerate(names):
        kit.add(name, LoRA(rank=8, targets="all-linear", layers=f"last:{LAST}"), seed=seed)
    items = [Prompted(item.input_ids[:8], (item.input_ids[8:],)) for item in texts(ROWS)]
    shared, apart = (TokenScorer(kit, [None, *names]) for _ in range(2))
    apart._is_trunk_known = True  # that there is none

    @torch.no_grad()
    def ask(scorer: TokenScorer) -> list[Tensor]:
        run = lambda routes: [scorer.row_logits([routes[0]] * len(items), items).log_probs()]  # noqa: E731
        return scorer.under_each(sum(map(len, items)), run)

    times = interleaved({"apart": lambda: ask(apart), "shared": lambda: ask(shared)}, rounds)
    equal = all(torch.equal(*pair) for pair in zip(ask(shared), ask(apart), strict=True))
    ratio = times.ratio("shared", "apart")
    detail = f"apart {times.best('apart'):.3f} s, shared {times.best('shared'):.3f} s; "
    detail += "bit-equal" if equal else "not bit-equal"
    label = (
        f"The base and {ADAPTERS} adapters on the last {LAST} of {SMOL.num_hidden_layers} blocks asked, trunk shared"
    )
    return [Line(label, times.ratio_text("shared", "apart"), f"<= {ASK_LIMIT:.2f} x", ratio <= ASK_LIMIT, detail)]


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
    for what in dtypes or ["float32", "bfloat16", "asked"]:
        for line in asked(int(rounds)) if what == "asked" else lines(getattr(torch, what), int(rounds)):
            print(f"{line.metric}: {line.measured} (asked {line.target}, {'yes' if line.reached else 'NO'})")
            print(f"  {line.detail}", flush=True)
