"""Everything a run needs, made from its config: data encoded, model frozen, adapters added, jobs planned.

Nothing is learnt here. What is cheap to find out comes first, so that a fault in a file or a setting is told before a
model is loaded. It knows configs, data and kits, and nothing of screens and folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.errors import ConfigError, Faults
from kitout.kit import Kit
from kitout.train.config.conflicts import contradictions
from kitout.train.config.schema import AugmentConfig, DataConfig, RunConfig, TrainConfig
from kitout.train.loop.batch_plan import plan, steps_of
from kitout.train.loop.jobs import Job
from kitout.train.loop.optimizer import REFUSED, check_rate
from kitout.train.objectives.causal_lm import Causal
from kitout.train.objectives.objective import Objective
from kitout.train.objectives.seq2seq_lm import Seq2Seq
from kitout.train.objectives.sequence import Labels
from kitout.train.objectives.token_classification import Tagging
from kitout.train.setup import base_model, datasets
from kitout.train.setup.datasets import Sets
from kitout.train.setup.heads import own_heads

TASKS: dict[str, Any] = {"classify": "classification", "regress": "regression", "multilabel": "multilabel"}


@dataclass(frozen=True)
class Prepared:
    """jobs, sets: in the same order. why: of the number format. notes: warnings. opening: as in `Built`."""

    kit: Kit
    jobs: list[Job]
    sets: list[Sets]
    tokenizer: Any
    objective: str
    why: str
    notes: list[str]
    opening: Mapping[str, Any]

    @property
    def main(self) -> Sets:
        return self.sets[0]


def prepare(config: RunConfig) -> Prepared:
    """The kit wears nothing yet; every adapter is fresh from its seed."""
    alone = config.alone()
    notes = _rates(alone)
    about = base_model.config_of(config.model)
    images = _of_images(config.objective, about)
    tokenizer = None if images else base_model.tokenizer_of(config.model)
    held = _all_sets(alone, about, tokenizer, images)
    kinds = {one.objective for one in held}
    if len(kinds) > 1:
        raise ConfigError(f"the jobs of one run share one objective; found {', '.join(sorted(kinds))}: split the run")
    (kind,) = kinds
    _check_resolved(alone, kind)
    lengths = [item.length for one in held for item in (one.looked_at or one.train) if not images]
    median = sorted(lengths)[len(lengths) // 2] if lengths else 0
    filler = None if images else _filler(about, tokenizer)
    given = filler if needs_filler(kind, about) else None
    side = alone[0].data.image_size if images else None
    made = base_model.build(config.model, kind, held[0].names if kind != "regress" else (), median, given, side)
    kit = made.kit
    for job, one in zip(alone, held, strict=True):
        heads = own_heads(made.heads, made.missing, len(one.names) or 1, job.train.seed, job.train.head)
        kit.add(job.output.name, job.method, seed=job.train.seed, heads=heads)
    if made.missing and held[0].names:
        commonest = f"; the commonest one is right in {100 * held[0].majority:.1f} %" if held[0].majority else ""
        notes.append(f"the base has no trained head for these labels: its figures are those of chance{commonest}")
    jobs = []
    for job, one in zip(alone, held, strict=True):
        objective = _objective(kit, job, kind, one, filler)
        planned = _planned(one, objective, job.train)
        jobs.append(Job(job.output.name, objective, one.train, planned, job.train, one.validation))
    _ready(kit, jobs)
    return Prepared(kit, jobs, held, tokenizer, kind, made.why, notes, made.opening)


def _check_resolved(alone: Sequence[RunConfig], kind: str) -> None:
    """What contradicts itself only now that the objective is known."""
    faults = Faults(ConfigError, f"objective={kind}, as the data and the model have it")
    for job in alone:
        for fault in contradictions(job.model_copy(update={"objective": kind})):
            faults.add(fault)
    faults.raise_if_any()


def _rates(alone: Sequence[RunConfig]) -> list[str]:
    faults = Faults(ConfigError, "learning rates")
    notes = []
    for job in alone:
        try:
            note = None if job.train.lr is None else check_rate(job.method, job.train.lr)
        except ConfigError as wrong:
            faults.add(f"{job.output.name}: {wrong}")
            continue
        notes += [f"{job.output.name}: {note}"] if note else []
        head, own = job.train.head_lr, job.method.advised().head
        if head is not None and head >= REFUSED * own:
            faults.add(
                f"{job.output.name}: head_lr={head:g} is {head / own:,.0f} times the default of {own:g}: leave it out"
            )
    faults.raise_if_any()
    return notes


def _of_images(objective: str, about: Any) -> bool:
    """Whether the model reads images: said, or the class of its config says so."""
    if objective != "auto":
        return objective == "images"
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return type(about) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _all_sets(alone: Sequence[RunConfig], about: Any, tokenizer: Any, images: bool) -> list[Sets]:
    """Each job's; jobs that read the same data share them."""
    held: list[Sets] = []
    for k, job in enumerate(alone):
        same = (n for n in range(k) if _read(alone[n].data) == _read(job.data) and not job.data.streaming)
        n = next(same, None)
        held.append(_sets(job, about, tokenizer, images) if n is None else held[n])
    return held


def _read(data: DataConfig) -> DataConfig:
    """Without what comes only after reading."""
    return data.model_copy(update={"augment": AugmentConfig(), "image_size": None})


def _sets(job: RunConfig, about: Any, tokenizer: Any, images: bool) -> Sets:
    if images:
        return datasets.image_sets(job.data)
    return datasets.text_sets(job.data, job.objective, tokenizer, bool(getattr(about, "is_encoder_decoder", False)))


def _objective(kit: Kit, job: RunConfig, kind: str, one: Sets, filler: int | None) -> Objective:
    if kind == "images":
        from kitout.data.images.augment import Augment
        from kitout.data.images.pixels import Pixels
        from kitout.train.objectives.image_classification import Pictures

        said = job.data.augment
        changes = None
        if said != AugmentConfig():
            changes = Augment(said.min_crop, said.horizontal_flip, said.rotate, said.color_jitter)
        return Pictures(kit, one.images, Pixels.of(base_model.found(job.model.name), job.data.image_size, changes))
    if kind == "causal":
        return Causal(kit, job.data.max_length if job.train.packing else 0)
    assert filler is not None
    if kind == "seq2seq":
        return Seq2Seq(kit, filler)
    return Tagging(kit, filler) if kind == "tokens" else Labels(kit, TASKS[kind], filler)


def needs_filler(kind: str, about: Any) -> bool:
    """Whether the model must be told a padding id: it judges texts, and its config names none."""
    return kind not in ("causal", "seq2seq", "images") and about.get_text_config().pad_token_id is None


def _filler(about: Any, tokenizer: Any) -> int:
    """The id rows are filled with. Decoders find a row's last token by it, so it must not be one that texts hold."""
    named = about.get_text_config().pad_token_id
    known = (named, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in known if i is not None)


def _planned(one: Sets, objective: Objective, chosen: TrainConfig) -> list[list[int]]:
    if one.looked_at:
        assert chosen.steps is not None
        return [list(range(s * chosen.batch, (s + 1) * chosen.batch)) for s in range(chosen.steps)]
    sizes = [objective.size(item) for item in one.train]
    steps = chosen.steps or steps_of(len(sizes), chosen.batch, chosen.epochs)
    return plan(sizes, chosen.batch, steps, chosen.seed, chosen.group_by_length, one.sets or None, one.weights or None)


def _ready(kit: Kit, jobs: Sequence[Job]) -> None:
    """Language models find the cheapest exact way to their loss, tried on the first rows of every job."""
    names = [job.name for job in jobs]
    for job in jobs:
        if isinstance(job.objective, Causal | Seq2Seq):
            few = [job.items[i] for rows in job.steps[:2] for i in rows]
            with kit.use(job.name):
                job.objective.prepare(names, few)
