"""Teach an adapter to classify images: one loop for every method, resumable, and the trunk computed once where frozen.

AdamW, a linear rise and a half cosine; nothing with one dimension decays. The frozen model stays in eval mode (no
dropout, no drop-path), as VPT's own code does; the adapter and its head are in training mode. It knows no file format,
no screen and no method.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout.data.images.image_set import Images
from kitout.data.images.pixels import Pixels
from kitout.errors import ConfigError, Faults, KitoutError
from kitout.kit import Kit
from kitout.runtime.adapter import Adapter
from kitout.train import checkpoint
from kitout.train.forward import logits
from kitout.train.loop.frozen_trunk import Trunk
from kitout.train.schedule import rise_and_fall

MOST_KEPT = 2 * 2**30  # bytes of trunk features held in memory; a larger set is computed again each time


class Diverged(KitoutError, ArithmeticError):
    """A loss that is no number."""


@dataclass(frozen=True)
class Recipe:
    """How one method is trained. head_lr: of the adapter's heads, default lr. decay: weight decay.

    save_every: seconds between checkpoints.
    """

    lr: float = 1e-3
    head_lr: float | None = None
    decay: float = 1e-4
    epochs: float = 3.0
    batch: int = 16
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: float = 20.0

    def __post_init__(self) -> None:
        faults = Faults(ConfigError, "Recipe")
        for name in ("lr", "head_lr", "epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                faults.add(f"{name} is {value!r}, expected a number above 0")
        if self.batch < 2:
            faults.add(f"batch is {self.batch!r}, expected at least 2 (a batch norm has no variance over one image)")
        faults.raise_if_any()


@dataclass
class Progress:
    """What a run has done so far. trunk_seconds: spent on frozen features, part of seconds; 0 without a trunk.

    processor_seconds: of all threads; what a busy machine cannot stretch.
    """

    step: int = 0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    trunk_seconds: float = 0.0
    processor_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)


Tell = Callable[[Progress], None]


def fit(
    kit: Kit, name: str, images: Images, pixels: Pixels, recipe: Recipe,
    file: Path | None = None, run: str = "", tell: Tell | None = None,
) -> Progress:  # fmt: skip
    """Trains adapter `name`. file: a checkpoint, from which this very `run` goes on. Leaves everything in eval mode."""
    adapter = kit[name]
    kit.train_only(name)
    optimiser = torch.optim.AdamW(_groups(adapter, recipe))
    batches = plan(len(images), recipe)
    values = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
    done = Progress(**((checkpoint.load(file, run, values, optimiser) if file else None) or {}))
    if done.step:
        done.resumed_at.append(done.step)
    done.steps = len(batches)
    kit.eval()
    with kit.use(name):
        forward = _forward(kit, name, images, pixels, recipe, done)
        adapter.train()
        saved = time.perf_counter()
        for step in range(done.step, len(batches)):
            start, spent = time.perf_counter(), time.process_time()
            for group in optimiser.param_groups:
                group["lr"] = group["full"] * rise_and_fall(step, len(batches), recipe.warmup)
            loss = _step(forward, images, batches[step], step, optimiser, adapter, recipe)
            done.step, done.images = step + 1, done.images + len(batches[step])
            done.losses.append(round(loss, 4))
            now = time.perf_counter()
            done.seconds += now - start
            done.processor_seconds += time.process_time() - spent
            if file and (now - saved >= recipe.save_every or done.step == len(batches)):
                checkpoint.save(file, run, values, optimiser, asdict(done))
                saved = time.perf_counter()
            if tell:
                tell(done)
    kit.eval()
    return done


Forward = Callable[[Sequence[int], int], Tensor]  # rows of the set, the step's seed -> logits


def _step(
    forward: Forward, images: Images, rows: Sequence[int], step: int,
    optimiser: torch.optim.Optimizer, adapter: Adapter, recipe: Recipe,
) -> float:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout too is the same after a kill
        out = forward(rows, recipe.seed * 1_000_003 + step)
    loss = F.cross_entropy(out.float(), torch.tensor([images.labels[i] for i in rows], device=out.device))
    if not torch.isfinite(loss):
        raise Diverged(f"step {step + 1}: the loss is {loss.item()}; try a lower lr than {recipe.lr:g}")
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), recipe.clip)
    optimiser.step()
    return loss.item()


def plan(size: int, recipe: Recipe) -> list[list[int]]:
    """The rows of every step: epochs shuffled one after the other, cut into full batches, all by the seed."""
    dice = random.Random(recipe.seed)
    steps = max(1, round(recipe.epochs * size / recipe.batch))
    stream: list[int] = []
    while len(stream) < steps * recipe.batch:
        epoch = list(range(size))
        dice.shuffle(epoch)
        stream += epoch
    return [stream[i * recipe.batch : (i + 1) * recipe.batch] for i in range(steps)]


def _groups(adapter: Adapter, recipe: Recipe) -> list[dict[str, object]]:
    """Parameter groups by learning rate and decay; scales, shifts, biases and gains do not decay."""
    heads = {id(value) for value in adapter.heads.parameters()}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for value in adapter.parameters():
        lr = recipe.lr if recipe.head_lr is None or id(value) not in heads else recipe.head_lr
        groups.setdefault((lr, recipe.decay if value.ndim > 1 else 0.0), []).append(value)
    return [{"params": held, "lr": lr, "full": lr, "weight_decay": decay} for (lr, decay), held in groups.items()]


def _forward(kit: Kit, name: str, images: Images, pixels: Pixels, recipe: Recipe, done: Progress) -> Forward:
    """From pixels each time, or from the trunk's features, computed here once per image."""

    def whole(rows: Sequence[int], seed: int) -> Tensor:
        return logits(kit, pixels(images, rows, seed).to(kit.device))

    if pixels.augment is not None or done.step == done.steps:
        return whole  # every epoch sees other pixels
    start, spent = time.perf_counter(), time.process_time()
    few = range(min(2, len(images)))
    trunk = Trunk.below(kit, name, pixels(images, list(few)).to(kit.device))
    if trunk is None:
        return whole
    kept: list[Tensor] = []
    for at in range(0, len(images), recipe.batch):
        rows = range(at, min(at + recipe.batch, len(images)))
        kept.append(trunk.record(pixels(images, rows).to(kit.device)))
        if kept[0][0].nbytes * len(images) > MOST_KEPT:
            return whole
    done.trunk_seconds += time.perf_counter() - start
    done.seconds += time.perf_counter() - start
    done.processor_seconds += time.process_time() - spent
    features, below = torch.cat(kept), trunk
    return lambda rows, _seed: below.logits(features[list(rows)])


@torch.no_grad()
def predict(
    kit: Kit, name: str | None, images: Images, pixels: Pixels,
    tell: Callable[[int, int], None] | None = None, batch: int = 32,
) -> Tensor:  # fmt: skip
    """Logits [images, classes] of an adapter (None: the base) in eval mode, without augmentation."""
    kit.eval()
    found = []
    with kit.use(name):
        for at in range(0, len(images), batch):
            if tell:
                tell(at, len(images))
            found.append(logits(kit, pixels(images, range(at, min(at + batch, len(images)))).to(kit.device)).cpu())
    if tell:
        tell(len(images), len(images))
    return torch.cat(found)
