"""The frozen trunk under an adapter, computed once per image: the input of the first changed module is cached.

One probe forward shows which modules run before the first one that the adapter changes; that one is the cut. Later the
model's own forward runs with the modules before the cut returning constants and the cached input put in at the cut, so
whatever comes after is the model's own code. `keep_features` does this for the jobs of a run (train.trunk). It knows no
architecture: the result is compared with the whole model, and where it differs there is no trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kitout import fast
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job
from kitout.train.objectives.image_classification import ImageClassification, image_logits

PROBE_ROWS = 5  # of the probe forward: a number that is no other dimension of an image
TOLERANCE = 1e-4  # of the largest value


class FrozenTrunk:
    """The modules of the base that run before the cut.

    `record(pixels)` gives the features of images, [B, ...]; `logits(features)` equals the kit's logits of those images.
    """

    cut: str
    """The module whose input is cached: the first that the adapter changes, or the block that holds it."""
    outputs_before_cut: dict[str, Any]
    """What each module before the cut returned for PROBE_ROWS images; returned again in place of a real result."""
    shape: tuple[int, ...]
    """Of one image: channels, height, width."""

    def __init__(self, kit: Kit, cut: str, outputs_before_cut: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.kit, self.cut, self.outputs_before_cut, self.shape = kit, cut, dict(outputs_before_cut), shape

    @classmethod
    def build(cls, kit: Kit, name: str, pixels: Tensor) -> FrozenTrunk | None:
        """The trunk of an adapter, proven on these images; None if nothing frozen comes first or the proof fails."""
        adapter = kit[name]
        changed = {site.path for site in adapter.sites} | {*adapter.by_module, *adapter.input_relays}
        probe = pixels[:1].expand(PROBE_ROWS, *pixels.shape[1:]).contiguous()
        with kit.use(name):
            with torch.no_grad():
                events = _module_events(kit, probe)
                cut = _find_cut(kit, changed, events)
                if cut is None:
                    return None
                start = events.index(("enter", cut))
                finished = _outermost({path for event, path in events[:start] if event == "leave"})
                if not finished or any(("enter", path) in events[start:] for path in finished):
                    return None  # nothing to cache, or a module of the trunk runs again after the cut
                trunk = cls(kit, cut, _record_outputs(kit, probe, finished), tuple(pixels.shape[1:]))
            trained = [value for value in adapter.parameters() if value.requires_grad]
            results = _logits_and_gradients(trunk.logits(trunk.record(pixels)), trained)
            references = _logits_and_gradients(image_logits(kit, pixels), trained)
        return trunk if _all_close(results, references) else None

    @torch.no_grad()
    def record(self, pixels: Tensor) -> Tensor:
        """The cut's input for these images, one row each; the forward ends there."""
        features: list[Tensor] = []

        def stop_at_cut(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            features.append(_first_tensor(args, kwargs))
            raise _CutReached

        handle = self.kit.base.get_submodule(self.cut).register_forward_pre_hook(stop_at_cut, with_kwargs=True)
        try:
            image_logits(self.kit, pixels)
        except _CutReached:
            pass
        finally:
            handle.remove()
        return features[0].clone()

    def logits(self, rows: Tensor, model: Any = None) -> Tensor:
        """The logits of recorded rows, with gradients for the adapter. model: what is called; default the kit."""

        def put_in_rows(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _replace_first_tensor(args, kwargs, rows)

        blank = torch.zeros(1, *self.shape, device=rows.device).expand(len(rows), *self.shape)
        handle = self.kit.base.get_submodule(self.cut).register_forward_pre_hook(put_in_rows, with_kwargs=True)
        try:
            with self._constant_modules(len(rows)):
                return image_logits(self.kit, blank, model)
        finally:
            handle.remove()

    @contextmanager
    def _constant_modules(self, num_rows: int) -> Iterator[None]:
        """The modules before the cut return what they returned to the probe, for this number of rows."""

        def constant_forward(output: Any) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: output

        with ExitStack() as exit_stack:
            for path, output in self.outputs_before_cut.items():
                attributes = self.kit.base.get_submodule(path).__dict__
                attributes["forward"] = constant_forward(_resize_batch(output, num_rows))
                exit_stack.callback(attributes.pop, "forward")
            yield


class FeatureCache:
    """The features of images at one cut, computed when they are first asked for; jobs with the same cut share it.

    Images are recorded in fixed batches, a whole one at a time. So a resumed run records features that are
    bit-identical to an uninterrupted run's.
    """

    features: dict[int, Tensor]
    """By image."""
    batches: list[list[int]]
    """Images that are recorded together."""
    batch_of: dict[int, int]
    """By image: the index of its batch."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.features, self.batches, self.batch_of = {}, [], {}
        self.add(batches)

    def add(self, batches: Sequence[Sequence[int]]) -> None:
        """More images; each is recorded with those of the first batch it comes in."""
        for batch in batches:
            new = [row for row in dict.fromkeys(batch) if row not in self.batch_of]
            self.batch_of |= dict.fromkeys(new, len(self.batches))
            self.batches.append(new)

    def get(self, rows: Sequence[int], record: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """The features of these images, [B, ...]. record: computes them."""
        for index in dict.fromkeys(self.batch_of[row] for row in rows if row not in self.features):
            features = record(self.batches[index]).cpu()
            self.features |= dict(zip(self.batches[index], features, strict=True))
        return torch.stack([self.features[row] for row in rows])


@dataclass(frozen=True)
class _CachedTrunk:
    """A cache and what its features are of."""

    cut: str
    """Where they are taken."""
    objective: ImageClassification
    """Whose images they are of."""
    probe: Tensor
    """The features of two images: another trunk with the same cut may still compute something else there."""
    cache: FeatureCache
    """The features."""

    def has_features_of(self, cut: str, objective: ImageClassification, probe: Tensor) -> bool:
        return (
            self.cut == cut
            and objective.images is self.objective.images
            and objective.pixels.size == self.objective.pixels.size
            and torch.equal(self.probe, probe)
        )


def keep_features(kit: Kit, jobs: Sequence[Job]) -> tuple[dict[str, str], list[str]]:
    """Caches the features of every job with train.trunk=auto, where that can be done. Cuts by job, and warnings."""
    cuts: dict[str, str] = {}
    warnings: list[str] = []
    cached: list[_CachedTrunk] = []
    available = jobs[0].settings.trunk_bytes
    for job in jobs:
        objective = job.objective
        if not isinstance(objective, ImageClassification) or not _may_cache(job, objective):
            continue
        pixels = objective.pixels(objective.images, list(job.examples[:2])).to(kit.device)
        trunk = FrozenTrunk.build(kit, job.name, pixels)
        if trunk is None:
            continue
        with kit.use(job.name):
            probe = trunk.record(pixels).cpu()
        shared = next((other for other in cached if other.has_features_of(trunk.cut, objective, probe)), None)
        cache = shared.cache if shared else FeatureCache([])
        batches = [[job.examples[i] for i in step] for step in job.batches]
        new_bytes = len({row for batch in batches for row in batch} - cache.batch_of.keys()) * probe[0].nbytes
        if new_bytes > available:
            warnings.append(
                f"{job.name}: train.trunk is off for it, its cached features would take too much memory "
                "(train.trunk_bytes); the frozen trunk is computed at each step"
            )
            continue
        available -= new_bytes
        cache.add(batches)
        if shared is None:
            cached.append(_CachedTrunk(trunk.cut, objective, probe, cache))
        objective.cached_logits_fn = _cached_logits_fn(kit, trunk, objective, cache)
        cuts[job.name] = trunk.cut
    return cuts, warnings


def _may_cache(job: Job, objective: ImageClassification) -> bool:
    """Not augmented images, which differ each time; not a base whose modules run under hooks of others."""
    settings = job.settings
    is_hooked = settings.fsdp or settings.activation_checkpointing or distributed.world_size() > 1
    return fast.enabled() and settings.trunk != "off" and objective.pixels.augment is None and not is_hooked


def _cached_logits_fn(
    kit: Kit, trunk: FrozenTrunk, objective: ImageClassification, cache: FeatureCache
) -> Callable[..., Tensor]:
    def record(rows: Sequence[int]) -> Tensor:
        return trunk.record(objective.pixels(objective.images, list(rows)).to(kit.device))

    return lambda model, rows: trunk.logits(cache.get(rows, record).to(kit.device), model)


# ---- the proof ----------------------------------------------------------------------------------------------------


def _logits_and_gradients(logits: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """The logits and every trained parameter's gradient: a parameter of the trunk would have none."""
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)]


def _all_close(results: list[Tensor | None], references: list[Tensor | None]) -> bool:
    for result, reference in zip(results, references, strict=True):
        if result is None or reference is None:
            if result is not reference:
                return False
            continue
        if result.shape != reference.shape:
            return False
        if not bool((result - reference).abs().max() <= TOLERANCE * (1 + reference.abs().max())):
            return False
    return True


# ---- the probe forward --------------------------------------------------------------------------------------------


class _CutReached(Exception):
    """Ends a forward at the cut: nothing after it is needed."""


def _module_events(kit: Kit, pixels: Tensor) -> list[tuple[str, str]]:
    """("enter" | "leave", path) of every module, in the order of one forward."""
    events: list[tuple[str, str]] = []

    def record(event: str, path: str) -> Callable[..., None]:
        return lambda *_: events.append((event, path))

    with ExitStack() as exit_stack:
        for path, module in kit.base.named_modules():
            if path:
                exit_stack.callback(module.register_forward_pre_hook(record("enter", path)).remove)
                exit_stack.callback(module.register_forward_hook(record("leave", path)).remove)
        image_logits(kit, pixels)
    return events


def _find_cut(kit: Kit, changed: set[str], events: list[tuple[str, str]]) -> str | None:
    """The first changed module to run, or the block that holds it; None if the model itself is changed."""
    if "" in changed:
        return None
    first = next((path for event, path in events if event == "enter" and path in changed), None)
    if first is None:
        return None
    return next((b.path for b in kit.survey.blocks if f"{first}.".startswith(f"{b.path}.")), first)


def _outermost(paths: set[str]) -> list[str]:
    """Without those inside another one of them."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _record_outputs(kit: Kit, pixels: Tensor, paths: list[str]) -> dict[str, Any]:
    outputs: dict[str, Any] = {}

    def record(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.update({path: output})

    with ExitStack() as exit_stack:
        for path in paths:
            exit_stack.callback(kit.base.get_submodule(path).register_forward_hook(record(path)).remove)
        image_logits(kit, pixels)
    return outputs


def _resize_batch(output: Any, num_rows: int) -> Any:
    """A module's output for PROBE_ROWS equal rows as it is for another number of them; takes no memory."""
    if isinstance(output, Tensor):
        is_batched = output.shape[:1] == (PROBE_ROWS,)
        return output[:1].expand(num_rows, *output.shape[1:]) if is_batched else output
    if isinstance(output, Mapping):
        return type(output)(**{key: _resize_batch(value, num_rows) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(_resize_batch(value, num_rows) for value in output)
    return output


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _replace_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    old = _first_tensor(args, kwargs)
    return tuple(new if a is old else a for a in args), {k: new if a is old else a for k, a in kwargs.items()}
