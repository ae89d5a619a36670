"""Train one adapter on prompts and answers: a plain loop that a kill cannot undo.

The loss is taken over the answers' tokens alone, and only their positions reach the output head. AdamW, linear warm-up,
cosine to zero. Every few steps one file (`kitout.train.checkpoint`) holds all that the next step depends on. It knows
no data format, no label and no screen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout import Kit
from kitout.demo.task import pad, plan
from kitout.errors import KitoutError
from kitout.train import checkpoint
from kitout.train.schedule import rise_and_fall


class Diverged(KitoutError, ArithmeticError):
    """A loss that is no number."""


@dataclass(frozen=True)
class Settings:
    """Tried on 500 validation tweets (1,280 to learn from, never the test tweets): lr 1e-3 gave 0.684, 2e-3 0.682."""

    rank: int = 8
    alpha: float = 16
    targets: str = "all-linear"
    layers: str = "all"
    lr: float = 1e-3
    batch: int = 16
    epochs: int = 1
    warmup: float = 0.06
    clip: float = 1.0
    seed: int = 0
    save_every: int = 20


@dataclass
class Progress:
    """What a run has done so far; kept in the checkpoint and in the results."""

    step: int = 0
    steps: int = 0
    tokens: int = 0  # of prompts and answers, without padding
    seconds: float = 0.0
    processor_seconds: float = 0.0  # of all threads; what a busy machine cannot stretch
    losses: list[float] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)


Pair = tuple[list[int], list[int]]  # tokens of the prompt, tokens of the answer


def train(
    kit: Kit, name: str, pairs: Sequence[Pair], filler: int, settings: Settings, file: Path, run: str,
    tell: Callable[[Progress], None],
) -> Progress:  # fmt: skip
    """Trains adapter `name`, which the kit must wear; goes on from `file` if it holds this very `run`."""
    values = dict(kit[name].named_parameters())
    optimiser = torch.optim.AdamW(values.values(), lr=settings.lr, weight_decay=0.0)
    batches = plan([len(p) + len(a) for p, a in pairs], settings.batch, settings.epochs, settings.seed)
    done = Progress(**(checkpoint.load(file, run, values, optimiser) or {}))
    if done.step:
        done.resumed_at.append(done.step)
    done.steps = len(batches)
    tell(done)
    kit.train()
    for step in range(done.step, len(batches)):
        start, spent = time.perf_counter(), time.process_time()
        chosen = [pairs[i] for i in batches[step]]
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * rise_and_fall(step, len(batches), settings.warmup)
        loss = answer_loss(kit, chosen, filler)
        if not torch.isfinite(loss):
            raise Diverged(f"step {step + 1}: the loss is {loss.item()}; try a lower --lr than {settings.lr:g}")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values.values(), settings.clip)
        optimiser.step()
        done.step, done.tokens = step + 1, done.tokens + sum(len(p) + len(a) for p, a in chosen)
        done.losses.append(round(loss.item(), 4))
        done.seconds += time.perf_counter() - start
        done.processor_seconds += time.process_time() - spent
        if done.step % settings.save_every == 0 or done.step == len(batches):
            checkpoint.save(file, run, values, optimiser, asdict(done))
        tell(done)
    kit.eval()
    return done


def answer_loss(kit: Kit, pairs: Sequence[Pair], filler: int) -> Tensor:
    """Mean cross-entropy of the answers' tokens given all before them."""
    batch = pad([prompt + answer for prompt, answer in pairs], filler, kit.device)
    width, longest = batch["input_ids"].shape[1], max(len(answer) for _, answer in pairs)
    # Positions as a tensor, not as "the last n": indexing gives the head a contiguous input. A slice would make the
    # product of a non-contiguous [B, n, d] with a matrix copy that matrix B times (measured: half of a step's time).
    places = torch.arange(width - longest - 1, width - 1, device=kit.device)
    logits = kit(**batch, logits_to_keep=places, use_cache=False).logits
    targets = batch["input_ids"][:, -longest:].clone()
    for row, (_, answer) in enumerate(pairs):
        targets[row, : longest - len(answer)] = -100
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
