"""Everything a run needs, made from its config: data encoded, model frozen, adapters added, jobs planned.

Nothing is learnt here. What is cheap to find out comes first, so that a fault in a file or a setting is told before a
model is loaded. It knows configs, data and kits, and nothing of screens and folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.errors import ConfigError, Errors
from kitout.kit import Kit
from kitout.train.config.conflicts import find_conflicts
from kitout.train.config.schema import AugmentConfig, DataConfig, RunConfig, TrainConfig
from kitout.train.loop.batch_plan import num_steps, plan_batches
from kitout.train.loop.jobs import Job
from kitout.train.loop.optimizer import REFUSE_ABOVE, check_learning_rate
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.objective import Objective
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import SequenceClassification
from kitout.train.objectives.token_classification import TokenClassification
from kitout.train.setup import base_model, datasets
from kitout.train.setup.datasets import Datasets
from kitout.train.setup.heads import build_heads

SEQUENCE_TASKS: dict[str, Any] = {
    "classification": "classification",
    "regression": "regression",
    "multilabel": "multilabel",
}


@dataclass(frozen=True)
class PreparedRun:
    """jobs, sets: in the same order. why: of the number format. notes: warnings. opening: as in `Built`."""

    kit: Kit
    jobs: list[Job]
    datasets: list[Datasets]
    tokenizer: Any
    objective: str
    dtype_reason: str
    warnings: list[str]
    from_pretrained_kwargs: Mapping[str, Any]

    @property
    def first_dataset(self) -> Datasets:
        return self.datasets[0]


def prepare(config: RunConfig) -> PreparedRun:
    """The kit wears nothing yet; every adapter is fresh from its seed."""
    alone = config.per_job()
    notes = _check_learning_rates(alone)
    about = base_model.load_config(config.model)
    images = _is_image_run(config.objective, about)
    tokenizer = None if images else base_model.load_tokenizer(config.model)
    held = _load_all_datasets(alone, about, tokenizer, images)
    kinds = {one.objective for one in held}
    if len(kinds) > 1:
        raise ConfigError(f"the jobs of one run share one objective; found {', '.join(sorted(kinds))}: split the run")
    (kind,) = kinds
    _check_objective(alone, kind)
    lengths = [item.length for one in held for item in (one.preview or one.train) if not images]
    median = sorted(lengths)[len(lengths) // 2] if lengths else 0
    filler = None if images else _choose_pad_token(about, tokenizer)
    given = filler if needs_pad_token(kind, about) else None
    side = alone[0].data.image_size if images else None
    made = base_model.load_base(
        config.model, kind, held[0].label_names if kind != "regression" else (), median, given, side
    )
    kit = made.kit
    for job, one in zip(alone, held, strict=True):
        heads = build_heads(made.heads, made.new_heads, len(one.label_names) or 1, job.train.seed, job.train.head)
        kit.add(job.output.name, job.method, seed=job.train.seed, heads=heads)
    if made.new_heads and held[0].label_names:
        commonest = (
            f"; the commonest one is right in {100 * held[0].majority_accuracy:.1f} %"
            if held[0].majority_accuracy
            else ""
        )
        notes.append(f"the base has no trained head for these labels: its figures are those of chance{commonest}")
    jobs = []
    for job, one in zip(alone, held, strict=True):
        objective = _build_objective(kit, job, kind, one, filler)
        planned = _plan_steps(one, objective, job.train)
        jobs.append(Job(job.output.name, objective, one.train, planned, job.train, one.validation))
    _choose_head_losses(kit, jobs)
    return PreparedRun(kit, jobs, held, tokenizer, kind, made.dtype_reason, notes, made.from_pretrained_kwargs)


def _check_objective(job_configs: Sequence[RunConfig], objective: str) -> None:
    """What contradicts itself only now that the objective is known."""
    faults = Errors(ConfigError, f"objective={objective}, as the data and the model have it")
    for job in job_configs:
        for fault in find_conflicts(job.model_copy(update={"objective": objective})):
            faults.add(fault)
    faults.raise_if_any()


def _check_learning_rates(job_configs: Sequence[RunConfig]) -> list[str]:
    faults = Errors(ConfigError, "learning rates")
    notes = []
    for job in job_configs:
        try:
            note = None if job.train.lr is None else check_learning_rate(job.method, job.train.lr)
        except ConfigError as wrong:
            faults.add(f"{job.output.name}: {wrong}")
            continue
        notes += [f"{job.output.name}: {note}"] if note else []
        head, own = job.train.head_lr, job.method.training_defaults().head_lr
        if head is not None and head >= REFUSE_ABOVE * own:
            faults.add(
                f"{job.output.name}: head_lr={head:g} is {head / own:,.0f} times the default of {own:g}: leave it out"
            )
    faults.raise_if_any()
    return notes


def _is_image_run(objective: str, hf_config: Any) -> bool:
    """Whether the model reads images: said, or the class of its config says so."""
    if objective != "auto":
        return objective == "image_classification"
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return type(hf_config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _load_all_datasets(
    job_configs: Sequence[RunConfig], hf_config: Any, tokenizer: Any, images: bool
) -> list[Datasets]:
    """Each job's; jobs that read the same data share them."""
    held: list[Datasets] = []
    for k, job in enumerate(job_configs):
        same = (
            n
            for n in range(k)
            if _reading_key(job_configs[n].data) == _reading_key(job.data) and not job.data.streaming
        )
        n = next(same, None)
        held.append(_load_datasets(job, hf_config, tokenizer, images) if n is None else held[n])
    return held


def _reading_key(config: DataConfig) -> DataConfig:
    """Without what comes only after reading."""
    return config.model_copy(update={"augment": AugmentConfig(), "image_size": None})


def _load_datasets(job_config: RunConfig, hf_config: Any, tokenizer: Any, images: bool) -> Datasets:
    if images:
        return datasets.load_image_datasets(job_config.data)
    return datasets.load_text_datasets(
        job_config.data, job_config.objective, tokenizer, bool(getattr(hf_config, "is_encoder_decoder", False))
    )


def _build_objective(
    kit: Kit, job_config: RunConfig, objective: str, dataset: Datasets, pad_token_id: int | None
) -> Objective:
    if objective == "image_classification":
        from kitout.data.images.augment import Augment
        from kitout.data.images.pixels import PixelProcessor
        from kitout.train.objectives.image_classification import ImageClassification

        said = job_config.data.augment
        changes = None
        if said != AugmentConfig():
            changes = Augment(said.min_crop, said.horizontal_flip, said.rotate, said.color_jitter)
        return ImageClassification(
            kit,
            dataset.images,
            PixelProcessor.from_pretrained(
                base_model.resolve_model(job_config.model.name), job_config.data.image_size, changes
            ),
        )
    if objective == "causal_lm":
        return CausalLM(kit, job_config.data.max_length if job_config.train.packing else 0)
    assert pad_token_id is not None
    if objective == "seq2seq_lm":
        return Seq2SeqLM(kit, pad_token_id)
    return (
        TokenClassification(kit, pad_token_id)
        if objective == "token_classification"
        else SequenceClassification(kit, SEQUENCE_TASKS[objective], pad_token_id)
    )


def needs_pad_token(objective: str, hf_config: Any) -> bool:
    """Whether the model must be told a padding id: it judges texts, and its config names none."""
    return (
        objective not in ("causal_lm", "seq2seq_lm", "image_classification")
        and hf_config.get_text_config().pad_token_id is None
    )


def _choose_pad_token(hf_config: Any, tokenizer: Any) -> int:
    """The id rows are filled with. Decoders find a row's last token by it, so it must not be one that texts hold."""
    named = hf_config.get_text_config().pad_token_id
    known = (named, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in known if i is not None)


def _plan_steps(dataset: Datasets, objective: Objective, settings: TrainConfig) -> list[list[int]]:
    if dataset.preview:
        assert settings.steps is not None
        return [list(range(s * settings.batch_size, (s + 1) * settings.batch_size)) for s in range(settings.steps)]
    sizes = [objective.num_tokens(item) for item in dataset.train]
    steps = settings.steps or num_steps(len(sizes), settings.batch_size, settings.epochs)
    return plan_batches(
        sizes,
        settings.batch_size,
        steps,
        settings.seed,
        settings.group_by_length,
        dataset.mixture_ranges or None,
        dataset.mixture_weights or None,
    )


def _choose_head_losses(kit: Kit, jobs: Sequence[Job]) -> None:
    """Language models find the cheapest exact way to their loss, tried on the first rows of every job."""
    names = [job.name for job in jobs]
    for job in jobs:
        if isinstance(job.objective, CausalLM | Seq2SeqLM):
            few = [job.examples[i] for rows in job.batches[:2] for i in rows]
            with kit.use(job.name):
                job.objective.choose_head_loss(names, few)
