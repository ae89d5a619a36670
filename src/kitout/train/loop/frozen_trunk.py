"""The frozen trunk below an adapter, once per image: what enters the first trained part is kept and given again.

One forward shows which modules run before the first one the adapter touches. What enters there is recorded, and later
the model's own forward runs with those modules standing still and the record put in their place, so whatever comes
after is the model's own code. `keep_features` makes it part of a run (train.trunk). It knows no architecture; where
the trick does not hold, there is no trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job
from kitout.train.objectives.image_classification import ImageClassification, image_logits

MAX_FEATURE_BYTES = 2 * 2**30  # bytes of features in memory, over all jobs of a run
PROBE_ROWS = 5  # of the forward that looks: a number that is no other dimension of an image
TOLERANCE = 1e-4  # of the largest value


class _CutReached(Exception):
    """The forward has reached the cut: nothing after it is wanted."""


class FrozenTrunk:
    """`record(pixels)` gives rows [B, ...]; `logits(rows)` equals the kit's own logits of those pixels.

    cut: the module whose input is kept. still: what the modules before it gave for ROWS rows.
    """

    def __init__(self, kit: Kit, cut: str, outputs_before_cut: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.kit, self.cut, self.outputs_before_cut, self.shape = kit, cut, dict(outputs_before_cut), shape

    @classmethod
    def build(cls, kit: Kit, name: str, pixels: Tensor) -> FrozenTrunk | None:
        """The trunk of an adapter, tried on these pixels; None where there is nothing frozen to keep."""
        looked = pixels[:1].expand(PROBE_ROWS, *pixels.shape[1:]).contiguous()
        adapter = kit[name]
        touched = {site.path for site in adapter.sites} | {*adapter.by_module, *adapter.input_relays}
        with kit.use(name):
            with torch.no_grad():
                order = _execution_order(kit, looked)
                cut = _find_cut(kit, touched, order)
                if cut is None:
                    return None
                before = order[: order.index(("in", cut))]
                still = _completed_modules(before)
                if not still or any(("in", path) in order[len(before) :] for path in still):
                    return None  # nothing to keep, or a block that runs again
                trunk = cls(kit, cut, _record_outputs(kit, looked, still), tuple(pixels.shape[1:]))
            values = [value for value in adapter.parameters() if value.requires_grad]
            found = _logits_and_gradients(trunk.logits(trunk.record(pixels)), values)
            true = _logits_and_gradients(image_logits(kit, pixels), values)
        return trunk if _all_close(found, true) else None

    @torch.no_grad()
    def record(self, pixels: Tensor) -> Tensor:
        """What enters the cut for these pixels, one row each; the forward ends there."""
        seen: list[Tensor] = []

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_first_argument(args, kwargs))
            raise _CutReached

        handle = self.kit.base.get_submodule(self.cut).register_forward_pre_hook(look, with_kwargs=True)
        try:
            image_logits(self.kit, pixels)
        except _CutReached:
            pass
        finally:
            handle.remove()
        return seen[0].clone()

    def logits(self, rows: Tensor, model: Any = None) -> Tensor:
        """The logits of recorded rows; gradients reach what the adapter trains. model: who is called, as the kit."""

        def give(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _replace_first_argument(args, kwargs, rows)

        handle = self.kit.base.get_submodule(self.cut).register_forward_pre_hook(give, with_kwargs=True)
        blank = torch.zeros(1, *self.shape, device=rows.device).expand(len(rows), *self.shape)
        try:
            with self._constant_modules(len(rows)):
                return image_logits(self.kit, blank, model)
        finally:
            handle.remove()

    @contextmanager
    def _constant_modules(self, num_rows: int) -> Iterator[None]:
        modules = {path: self.kit.base.get_submodule(path) for path in self.outputs_before_cut}
        for path, module in modules.items():
            module.__dict__["forward"] = _constant_forward(_resize_batch(self.outputs_before_cut[path], num_rows))
        try:
            yield
        finally:
            for module in modules.values():
                del module.__dict__["forward"]


class FeatureCache:
    """What enters one cut, kept for every image once it has been asked for; jobs with the same cut share it.

    batches: in which images are recorded, a whole one at a time: so a run that was resumed records what an unbroken
    one has recorded, bit for bit.
    """

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.features: dict[int, Tensor] = {}
        self.batches: list[list[int]] = []
        self.batch_of: dict[int, int] = {}
        self.add(batches)

    def add(self, batches: Sequence[Sequence[int]]) -> None:
        """More images; each is recorded with those that come with it for the first time."""
        for batch in batches:
            fresh = [row for row in dict.fromkeys(batch) if row not in self.batch_of]
            self.batch_of |= dict.fromkeys(fresh, len(self.batches))
            self.batches.append(fresh)

    def get(self, rows: Sequence[int], record: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """[B, ...] of these rows. record: finds the features of some images."""
        for batch in dict.fromkeys(self.batch_of[row] for row in rows if row not in self.features):
            found = record(self.batches[batch]).cpu()
            self.features |= dict(zip(self.batches[batch], found, strict=True))
        return torch.stack([self.features[row] for row in rows])


def keep_features(kit: Kit, jobs: Sequence[Job]) -> tuple[dict[str, str], list[str]]:
    """Has every job with train.trunk=auto keep what lies below it, where that can be done.

    The module each of these starts from, by job, and warnings.
    """
    cuts: dict[str, str] = {}
    notes = []
    held: list[tuple[FrozenTrunk, ImageClassification, Tensor, FeatureCache]] = []
    room = MAX_FEATURE_BYTES
    for job in jobs:
        settings, pictures = job.settings, job.objective
        if (
            settings.trunk == "off"
            or not isinstance(pictures, ImageClassification)
            or pictures.pixels.augment is not None
        ):
            continue
        if settings.fsdp or settings.activation_checkpointing or distributed.world_size() > 1:
            continue  # the base's modules run under hooks of others
        few = pictures.pixels(pictures.images, list(job.examples[:2])).to(kit.device)
        trunk = FrozenTrunk.build(kit, job.name, few)
        if trunk is None:
            continue
        with kit.use(job.name):
            probe = trunk.record(few).cpu()
        batches = [[job.examples[i] for i in step] for step in job.batches]
        features = next((kept for other, its, seen, kept in held if other.cut == trunk.cut
                         and its.images is pictures.images and its.pixels.size == pictures.pixels.size
                         and torch.equal(seen, probe)), None)  # fmt: skip
        before = len(features.batch_of) if features else 0
        trial = FeatureCache([*(features.batches if features else ()), *batches])
        taken = (len(trial.batch_of) - before) * probe[0].nbytes
        if taken > room:
            notes.append(f"{job.name}: its frozen trunk is computed each time, its features would take too much memory")
            continue
        room -= taken
        if features is None:
            features = trial
            held.append((trunk, pictures, probe, features))
        else:
            features.add(batches)
        pictures.cached_logits_fn = _features_fn(kit, trunk, pictures, features)
        cuts[job.name] = trunk.cut
    return cuts, notes


def _features_fn(
    kit: Kit, trunk: FrozenTrunk, pictures: ImageClassification, features: FeatureCache
) -> Callable[..., Tensor]:
    def record(rows: Sequence[int]) -> Tensor:
        return trunk.record(pictures.pixels(pictures.images, list(rows)).to(kit.device))

    return lambda model, rows: trunk.logits(features.get(rows, record).to(kit.device), model)


def _logits_and_gradients(logits: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """The logits and every trained value's gradient: what lies below the cut would have none."""
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)]


def _all_close(results: list[Tensor | None], references: list[Tensor | None]) -> bool:
    pairs = list(zip(results, references, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    return all(a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * (1 + b.abs().max())) for a, b in pairs
               if a is not None and b is not None)  # fmt: skip


def _constant_forward(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _execution_order(kit: Kit, pixels: Tensor) -> list[tuple[str, str]]:
    """("in" | "out", path) of every module as one forward enters and leaves it."""
    events: list[tuple[str, str]] = []
    handles = []
    for path, module in kit.base.named_modules():
        if path:
            enter, leave = _event_recorder(events, "in", path), _event_recorder(events, "out", path)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        image_logits(kit, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _event_recorder(events: list[tuple[str, str]], kind: str, path: str) -> Callable[..., None]:
    return lambda *_: events.append((kind, path))


def _find_cut(kit: Kit, touched: set[str], order: list[tuple[str, str]]) -> str | None:
    """The first trained module to run, or the block it lies in; None if the model itself is touched."""
    if "" in touched:
        return None
    first = next((path for what, path in order if what == "in" and path in touched), None)
    if first is None:
        return None
    return next((b.path for b in kit.survey.blocks if f"{first}.".startswith(f"{b.path}.")), first)


def _completed_modules(events: list[tuple[str, str]]) -> list[str]:
    """The modules that were entered and left, without those inside of another one of them."""
    done = {path for what, path in events if what == "out"}
    return [path for path in done if not any(path.startswith(f"{other}.") for other in done)]


def _record_outputs(kit: Kit, pixels: Tensor, paths: list[str]) -> dict[str, Any]:
    outputs: dict[str, Any] = {}

    def keeping(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.update({path: output})

    handles = [kit.base.get_submodule(path).register_forward_hook(keeping(path)) for path in paths]
    try:
        image_logits(kit, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _resize_batch(value: Any, rows: int) -> Any:
    """What a module gave for ROWS equal rows as it would be for another number; costs no memory."""
    if isinstance(value, Tensor):
        return value[:1].expand(rows, *value.shape[1:]) if value.shape[:1] == (PROBE_ROWS,) else value
    if isinstance(value, Mapping):
        return type(value)(**{key: _resize_batch(part, rows) for key, part in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_resize_batch(part, rows) for part in value)
    return value


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def _replace_first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    old = _first_argument(args, kwargs)
    return tuple(value if a is old else a for a in args), {k: value if a is old else a for k, a in kwargs.items()}
