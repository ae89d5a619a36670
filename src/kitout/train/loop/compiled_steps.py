"""Training steps over compiled blocks (train.compile), with batches of texts padded to few lengths (train.pad_to).

The lengths are chosen from the run's own batches, so that they have at most MAX_SHAPES shapes with as little padding
as can be; what comes in another shape runs without a graph. Only calls that record gradients are compiled, so
evaluations pay for nothing. It knows jobs, their batches and graphs, and no optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from kitout.data.encode.item import EncodedExample
from kitout.data.padding import widened
from kitout.kit import Kit
from kitout.runtime.graphs.block_graphs import BlockGraphs
from kitout.runtime.graphs.compile_blocks import compile as compile_kit
from kitout.runtime.graphs.compile_blocks import compiled, remove_graphs
from kitout.runtime.graphs.report import CompileReport
from kitout.train.loop.jobs import Job
from kitout.train.objectives.objective import Batch

MAX_SHAPES = 4
GRAPHS_PER_GROUP = (
    16 * MAX_SHAPES
)  # of jobs that share forwards: kinds of blocks, with a gradient of their input or not
SAMPLED_STEPS = 2_000  # whose rows decide the lengths
MULTIPLE = 8  # lengths are multiples of it
Shapes = Mapping[tuple[int, int], int]  # (rows, longest row) -> how many micro-batches have it


class CompiledSteps:
    """What a run's steps need to know of compiling: nothing is compiled outside of `running`."""

    lengths: tuple[int, ...]
    """That batches are padded to; () for their own."""
    report: CompileReport | None
    """What was compiled, once the steps are done; None where nothing was asked for."""

    def __init__(self, kit: Kit, jobs: Sequence[Job]) -> None:
        self.kit = kit
        self.is_on = any(job.settings.compile == "blocks" for job in jobs)
        self.lengths = tuple(sorted({length for job in jobs for length in job.settings.pad_to}))
        self.report: CompileReport | None = None
        self._shapes: set[tuple[Any, ...]] = set()

    @contextmanager
    def running(self, micro_batches: Iterator[Sequence[Any]], num_groups: int) -> Iterator[None]:
        """The blocks are compiled meanwhile. micro_batches: the examples of each, of which some are looked at."""
        if not self.is_on:
            yield
            return
        self.lengths = self.lengths or choose_lengths(_shapes_of(micro_batches))
        compile_kit(self.kit, limit=GRAPHS_PER_GROUP * num_groups, dynamic=False)
        graphs: BlockGraphs = self.kit.state.graphs
        graphs.needs_grad = True
        try:
            yield
        finally:
            self.report = compiled(self.kit)
            remove_graphs(self.kit.state)

    def padding(self) -> AbstractContextManager[None]:
        """Around what makes a batch."""
        return widened(self.lengths) if self.lengths else nullcontext()

    def around(self, batch: Batch) -> AbstractContextManager[None]:
        """Around the forward and backward of a batch: no graphs for it where it has a shape too many."""
        graphs: BlockGraphs | None = self.kit.state.graphs if self.is_on else None
        if graphs is None:
            return nullcontext()
        shape = tuple(tuple(value.shape) for value in batch.inputs.values() if isinstance(value, Tensor))
        if len(self._shapes) < MAX_SHAPES:
            self._shapes.add(shape)
        return nullcontext() if shape in self._shapes else graphs.paused()


def _shapes_of(micro_batches: Iterator[Sequence[Any]]) -> Shapes:
    """Of micro-batches of texts; images are all of one size."""
    found: Counter[tuple[int, int]] = Counter()
    for items in micro_batches:
        if items and all(isinstance(item, EncodedExample) for item in items):
            for longest in (max(len(item.input_ids) for item in items), max(len(item.target_ids) for item in items)):
                if longest:
                    found[len(items), longest] += 1
    return found


def choose_lengths(shapes: Shapes, max_shapes: int = MAX_SHAPES) -> tuple[int, ...]:
    """The lengths with the least padding that make at most so many shapes; one, where even that makes more."""
    padded: Counter[tuple[int, int]] = Counter()
    for (rows, longest), count in shapes.items():
        padded[rows, -longest // MULTIPLE * -MULTIPLE] += count
    lengths = sorted({length for _, length in padded})
    chosen: tuple[int, ...] = ()
    for number in range(1, min(max_shapes, len(lengths)) + 1):
        candidate = _least_padding(lengths, padded, number)
        in_use = {(rows, min(one for one in candidate if one >= length)) for rows, length in padded}
        if number == 1 or len(in_use) <= max_shapes:
            chosen = candidate
    return chosen


def _least_padding(lengths: Sequence[int], shapes: Shapes, number: int) -> tuple[int, ...]:
    """So many of the lengths, the largest among them, with the fewest padded tokens: by the last one but its own."""
    rows_of: Counter[int] = Counter()
    for (rows, length), count in shapes.items():
        rows_of[length] += rows * count
    best: dict[int, tuple[int, tuple[int, ...]]] = {-1: (0, ())}  # index of the largest chosen -> tokens, chosen
    for _ in range(number):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for end, length in enumerate(lengths):
            ways = [
                (tokens + length * sum(rows_of[one] for one in lengths[start + 1 : end + 1]), (*chosen, length))
                for start, (tokens, chosen) in best.items()
                if start < end
            ]
            if ways:
                longer[end] = min(ways)
        best = longer
    return best[len(lengths) - 1][1]
