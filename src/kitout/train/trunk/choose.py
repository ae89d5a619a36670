"""Whether a run keeps what enters the first trained block of its texts (train.trunk=auto), found by trying it.

One entry serves all jobs: the lowest block that any of them changes. It is taken if the losses and gradients of a few
examples are those of the whole model, and a usual micro-batch is faster with it. What was chosen holds for the whole
run. It knows jobs, kits and what is kept; what is kept of images is beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitout import fast
from kitout.base import memory
from kitout.data.encode.item import EncodedExample
from kitout.data.streaming import StreamedItems
from kitout.format import format_bytes
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.base_mode import training_mode
from kitout.train.loop.jobs import Job
from kitout.train.objectives.objective import StepObjective
from kitout.train.trunk.kept_inputs import KeptInputs, Recorded, keep, key_of, layout_of
from kitout.trunk.entry import TrunkEntry, find_entry
from kitout.trunk.feature_store import FeatureStore, digest_of

FILE = "trunk.bin"
MEMORY_SHARE = 0.25  # of the free memory; the rest of what is kept goes to the file
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the largest value; the rest: HALF_TOLERANCE
HALF_TOLERANCE = 2e-2
MAX_RATIO = 0.97  # of a micro-batch's time: with more than that the trunk is not worth its memory
NUM_TRIED, SEEN = 3, 64  # examples of the proof, of the first so many
ROUNDS = 2  # timed pairs of micro-batches


@dataclass(frozen=True)
class TrunkChoice:
    """What train.trunk came to."""

    cuts: dict[str, str] = field(default_factory=dict)
    """By job: the module whose input is kept; empty: none is."""
    text: str = ""
    """What is kept, or "off" and why; empty where it was not asked for."""


def choose_trunk(
    kit: Kit, jobs: Sequence[Job], evaluated: Sequence[Sequence[Sequence[Any]]], *, folder: Path, signature: str,
    micro_batch_size: int, chosen: str = "",
) -> TrunkChoice:  # fmt: skip
    """Keeps what enters the first changed block of these jobs' texts, where that can be done and pays.

    evaluated: by job the batches of its evaluations. folder: of the run, for the file. signature: of data, base, dtype
    and versions. chosen: the text of the run's first start, whose timing is not repeated; empty: this is it.
    """
    if all(job.settings.trunk == "off" for job in jobs):
        return TrunkChoice()
    if refusal := _refusal(jobs):
        return _off(refusal)
    if chosen.startswith("off"):
        return TrunkChoice(text=chosen)
    entry = _find(kit, jobs)
    if isinstance(entry, str):
        return _off(entry)
    free, limit = memory.available(torch.device("cpu")), jobs[0].settings.trunk_bytes
    in_memory = limit if free is None else int(MEMORY_SHARE * free)
    store = FeatureStore([(point.width, point.dtype) for point in entry.points], limit, in_memory, folder / FILE)
    kept = KeptInputs(entry, store)
    for job in jobs:
        kept.plan(job.objective, _first_uses(job))
    num_kept, num_left_out = len(store.slots), store.num_left_out
    if not num_kept:
        return _off(f"train.trunk_bytes={limit} has no room for one example")
    for job, batches in zip(jobs, evaluated, strict=True):
        kept.plan(job.objective, batches)
    names = [job.name for job in jobs]
    kit.train_only(*names)
    with training_mode(kit, names, any(job.settings.activation_checkpointing for job in jobs)):
        if not all(_is_proven(kit, job, kept) for job in jobs):
            return _off(f"from {entry.cut} on, losses or gradients are not those of the whole model")
        ratio = 0.0 if chosen else _timed(kit, jobs[0], kept, micro_batch_size)
    if ratio > MAX_RATIO:
        return _off(f"a step that begins at {entry.cut} takes {ratio:.2f} of the time, which is no gain")
    attention = getattr(kit.config, "_attn_implementation", "")  # transformers' own name; timm has none
    groups = [key_of(item) for _, group in kept.groups for item in group]
    store.use_file(digest_of([signature, entry.sources, attention, kit.device.type, groups]))
    keep(kit, kept)
    places = [(store.memory_used, "in memory"), (store.file_used, f"in {FILE} of the run's folder")]
    where = ", ".join(f"{format_bytes(size)} {place}" for size, place in places if size)
    rest = f"; {num_left_out:,} others have no room (train.trunk_bytes) and are computed again" if num_left_out else ""
    text = f"what leaves {entry.sources} is kept of {num_kept:,} training examples ({where}){rest}; "
    text += f"then a step takes {ratio:.2f} of the time" if ratio else "as when this run began"
    return TrunkChoice(dict.fromkeys(names, entry.cut), chosen or text)


def _off(reason: str) -> TrunkChoice:
    return TrunkChoice(text=f"off: {reason}")


def _refusal(jobs: Sequence[Job]) -> str:
    """Why it is not even tried."""
    if not fast.enabled():
        return f"{fast.VARIABLE}=off"
    off = [job.name for job in jobs if job.settings.trunk == "off"]
    if off:
        return f"the jobs of a run share their forwards, and {off[0]} has train.trunk=off"
    if distributed.world_size() > 1 or any(job.settings.fsdp for job in jobs):
        return "several processes divide the examples anew in each epoch"
    for job in jobs:
        if isinstance(job.examples, StreamedItems):
            return "a stream is read while training, so its examples are not known before"
        if isinstance(job.objective, StepObjective) or job.objective.rows != 1:
            return f"the objective of {job.name} reads more than one row of an example, or its whole step"
    if all(sum(map(len, job.batches)) == len({i for step in job.batches for i in step}) for job in jobs):
        return "no example is trained on twice"
    return ""


def _first_uses(job: Job) -> Iterator[list[Any]]:
    """Of each step the examples that no step before it had."""
    seen: set[int] = set()
    for step in job.batches:
        new = [i for i in step if i not in seen]
        seen.update(new)
        if new:
            yield [job.examples[i] for i in new]


def _find(kit: Kit, jobs: Sequence[Job]) -> TrunkEntry | str:
    items = _tried(jobs[0])
    if not all(isinstance(item, EncodedExample) for item in items):
        return f"the examples of {jobs[0].name} are not texts"
    batch = jobs[0].objective.collate(items, None)
    sides = ["input", "decoder"] if "decoder_input_ids" in batch.inputs else ["input"]
    shapes = {side: layout_of(batch, side).shape for side in sides}
    return find_entry(kit, [job.name for job in jobs], lambda: kit(**batch.inputs), shapes)


def _tried(job: Job) -> list[Any]:
    """Examples of different lengths among the first."""
    seen = sorted((job.examples[i] for i in range(min(SEEN, len(job.examples)))), key=lambda item: item.length)
    return [seen[k * (len(seen) - 1) // (NUM_TRIED - 1)] for k in range(min(NUM_TRIED, len(seen)))]


def _is_proven(kit: Kit, job: Job, kept: KeptInputs) -> bool:
    """Examples recorded one by one and padded together have the losses and gradients of the whole model."""
    items = _tried(job)
    expected = _losses_and_gradients(kit, job, items)
    recorded: Recorded = {}
    try:
        for item in items:
            recorded |= kept.record(job.objective, [item])
        found = _losses_and_gradients(kit, job, items, kept, recorded)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):  # a block reads what is not there
        return False
    tolerance = TOLERANCE.get(kit.dtype, HALF_TOLERANCE)
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif not bool((one - other).abs().max() <= tolerance * (1e-3 + other.abs().max())):  # nan is not close
            return False
    return True


def _losses_and_gradients(
    kit: Kit, job: Job, items: Sequence[Any], kept: KeptInputs | None = None, recorded: Recorded | None = None
) -> list[Tensor | None]:
    """Of one micro-batch. kept: it begins at the entry with what was recorded."""
    adapter, device = kit[job.name], kit.device
    trained = [value for value in adapter.parameters() if value.requires_grad]
    before = {value: value.clone() for value in adapter.buffers()}  # a BatchNorm counts what it sees
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), kit.use(job.name):
        torch.manual_seed(0)
        batch = job.objective.collate(items, list(range(len(items))))
        context: AbstractContextManager[None] = nullcontext()
        if kept is not None and recorded is not None:
            context = kept.entering_with(recorded, items, batch)
        with context:
            losses = job.objective.losses(kit, batch, torch.ones(len(items), device=device) / len(items))
        gradients = torch.autograd.grad(losses.total, trained, allow_unused=True)
    with torch.no_grad():
        for value, old in before.items():
            value.copy_(old)
    return [losses.per_example, *gradients]


def _timed(kit: Kit, job: Job, kept: KeptInputs, micro_batch_size: int) -> float:
    """The time of a usual micro-batch with what is kept, as a share of its time without."""
    steps = sorted(job.batches, key=lambda step: max(job.objective.num_tokens(job.examples[i]) for i in step))
    items = [job.examples[i] for i in steps[len(steps) // 2][:micro_batch_size]]
    recorded = kept.record(job.objective, items)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for is_kept in (True, False):
            start = time.perf_counter()
            _losses_and_gradients(kit, job, items, kept if is_kept else None, recorded)
            if kit.device.type == "cuda":
                torch.cuda.synchronize(kit.device)
            seconds[is_kept].append(time.perf_counter() - start)
    return min(seconds[True]) / max(min(seconds[False]), 1e-9)
