"""Everything a run needs, made from its config: datasets, the frozen base, adapters, jobs with their batches.

Nothing is trained here. What is cheap to find out comes first, so that an error in a file or a setting is reported
before a model is loaded. It knows configs, data and kits, and nothing of screens and folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kitout.data.answer_statistics import rows_of
from kitout.data.encode.template_date import fix_template_date
from kitout.data.read.row_sample import RowSample
from kitout.errors import ConfigError, Errors
from kitout.kit import Kit
from kitout.train.config.conflicts import find_conflicts
from kitout.train.config.schema import AugmentConfig, DataConfig, RunConfig
from kitout.train.config.seeds import SeedsByJob, repeated_adapters
from kitout.train.loop import distributed
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.jobs import Job
from kitout.train.objectives.objective import LanguageObjective, Objective
from kitout.train.objectives.signals_of_items import NUM_ITEMS, first_items, start_from_items
from kitout.train.objectives.tasks import TASKS, ObjectiveSettings, Task
from kitout.train.setup.base_model import (
    LoadedBase,
    Placement,
    choose_pad_token,
    choose_placement,
    find_base,
    load_base,
    load_tokenizer,
    set_target_language,
)
from kitout.train.setup.datasets import load_datasets
from kitout.train.setup.find_inputs import resolve_model
from kitout.train.setup.heads import build_heads
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.lengths import (
    TextLengths,
    are_too_long,
    check_vocabulary,
    fit_lengths,
    requested_lengths,
    warn_of_lengths,
)
from kitout.train.setup.parent import Parent, load_parent, load_parts, read_parent, read_parts
from kitout.train.setup.schedule import Schedule, check_learning_rates, choose_schedule

MAX_PLANNED_EXAMPLES = 30_000_000  # rows of all steps, whose order is kept in memory
SAMPLED_STEPS = 1_000  # planned of a dry run over a sample, and then again


@dataclass(frozen=True)
class PreparedRun:
    """A run before its first step. Its kit has every adapter, fresh from its seed, and none is active."""

    kit: Kit
    """The frozen base with the adapters."""
    jobs: list[Job]
    """One per adapter."""
    datasets: list[Datasets]
    """Of each job, in the same order."""
    tokenizer: Any
    """The model's own; None for images."""
    task: Task
    """Of all jobs."""
    dtype_reason: str
    """Why the base has its dtype, in words."""
    warnings: list[str]
    """What the pre-flight warns of, besides the data."""
    schedules: list[Schedule]
    """How long each job trains, and why."""
    new_heads: frozenset[str] = frozenset()
    """Paths of the base's modules that its checkpoint does not hold: without an adapter they are random."""
    parents: Mapping[str, Parent] = field(default_factory=dict)
    """By job: the adapter that it continues."""
    lengths: Sequence[TextLengths] = ()
    """By job: how long its texts may be; empty for images."""
    parts: Mapping[str, Parent] = field(default_factory=dict)
    """By name: the frozen adapters that compositions are made of."""
    seeds: SeedsByJob = field(default_factory=dict)
    """The adapters that are one job with several seeds."""

    @property
    def objective(self) -> str:
        """The name of the task."""
        return self.task.name

    @property
    def first_dataset(self) -> Datasets:
        """Of the first job."""
        return self.datasets[0]


def prepare(
    config: RunConfig, placement: Placement | None = None, log: Callable[[str], None] = lambda _line: None,
    samples: bool = False, task: Task | None = None,
) -> PreparedRun:  # fmt: skip
    """The run that a config describes. placement: of the base; None: found here. log: of the progress of large data.

    samples: of large data take a sample, for a dry run. task: of another table; None: by the config's objective.
    """
    job_configs = config.per_job()
    parents = {one.output.name: read_parent(one.train.from_) for one in job_configs if one.train.from_ is not None}
    warnings = check_learning_rates(config.without_seeds())
    parts = read_parts(config.model.adapters)
    hf_config = find_base(config, log)
    requested = task or config.objective
    tokenizer = None if reads_images(requested, hf_config) else load_tokenizer(config.model)
    date_warning = "" if tokenizer is None else _fix_template_date(tokenizer, job_configs)
    new_tokens = 0 if task is None else task.new_tokens
    lengths = [] if tokenizer is None else [requested_lengths(job.data, tokenizer, new_tokens) for job in job_configs]
    log(f"reading {', '.join(dict.fromkeys(source.path for job in job_configs for source in job.data.train))} ...")
    datasets = load_all_datasets(job_configs, requested, hf_config, tokenizer, lengths, log, samples)
    warnings += [date_warning] if date_warning and any(dataset.is_chat for dataset in datasets) else []
    task = common_task(job_configs, datasets)
    pad_token_id = None if task.reads_images else choose_pad_token(hf_config, tokenizer)
    log(f"loading {config.model.name} ...")
    base = _load_base(config, task, placement or choose_placement(config.model), datasets, hf_config, pad_token_id)
    _set_language_of_targets(base, job_configs, datasets)
    warnings += _warn_of_new_heads(base, datasets[0])
    load_parts(base.kit, parts)
    for job_config, dataset in zip(job_configs, datasets, strict=True):
        _add_adapter(base, job_config, task, dataset, parents.get(job_config.output.name))
    if tokenizer is not None:
        check_vocabulary(base.kit, tokenizer)
        datasets, lengths = _fit_datasets(
            base.kit, job_configs, requested, hf_config, tokenizer, datasets, lengths, log, samples
        )
        for job_config, dataset in zip(job_configs, datasets, strict=True):
            if job_config.output.name not in repeated_adapters(config.seeds_by_job()):
                warnings += warn_of_lengths(base.kit, job_config.output.name, _encoded(dataset), tokenizer)
    schedules = [
        choose_schedule(
            None if dataset.preview else dataset.sampled_of or len(dataset.train),
            one.train,
            one.method,
            distributed.world_size(),
        )
        for one, dataset in zip(job_configs, datasets, strict=True)
    ]
    jobs = [
        _build_job(base, job_config, task, dataset, pad_token_id, schedule, lengths[i].text.tokens if lengths else 0)
        for i, (job_config, dataset, schedule) in enumerate(zip(job_configs, datasets, schedules, strict=True))
    ]
    for job in jobs:
        if isinstance(job.objective, LanguageObjective):
            first_rows = [job.examples[i] for rows in job.batches[:2] for i in rows]
            with base.kit.use(job.name):
                job.objective.choose_head_loss([one.name for one in jobs], first_rows)
    for job, job_config, dataset in zip(jobs, job_configs, datasets, strict=True):
        if job.name not in parents and job_config.method.without_start() is not job_config.method:
            items = dataset.preview or first_items(job.examples, job.batches, NUM_ITEMS)
            start_from_items(base.kit, job.name, job_config.method, job.objective, items, job.settings.seed)
    return PreparedRun(
        base.kit, jobs, datasets, tokenizer, task, base.dtype_reason, warnings,
        schedules, base.new_heads, parents, lengths, parts, config.seeds_by_job(),
    )  # fmt: skip


def _fix_template_date(tokenizer: Any, job_configs: Sequence[RunConfig]) -> str:
    """Today, for the chat template of all jobs. A warning where the date cannot be fixed."""
    days = sorted({job.data.template_date for job in job_configs if job.data.template_date is not None})
    if len(days) > 1:
        raise ConfigError(f"the jobs of one run have one chat template; found data.template_date={', '.join(days)}")
    return fix_template_date(tokenizer, days[0]) if days else ""


def reads_images(requested: str | Task, hf_config: Any) -> bool:
    """Whether the model reads images: by the requested objective, else by the class of its config."""
    if isinstance(requested, Task):
        return requested.reads_images
    if requested != "auto":
        return TASKS[requested].reads_images
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return type(hf_config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def load_all_datasets(
    job_configs: Sequence[RunConfig],
    requested: str | Task,
    hf_config: Any,
    tokenizer: Any,
    lengths: Sequence[TextLengths],
    log: Callable[[str], None],
    samples: bool,
) -> list[Datasets]:
    """The datasets of each job; jobs that read the same data share them, except streams, which are read on."""
    is_encoder_decoder = bool(getattr(hf_config, "is_encoder_decoder", False))
    loaded: list[tuple[DataConfig, TextLengths | None, Datasets]] = []
    for i, job in enumerate(job_configs):
        # what is applied after reading does not count
        reading = job.data.model_copy(update={"augment": AugmentConfig(), "image_size": None})
        own = lengths[i] if lengths else None
        shared = [one for config, other, one in loaded if (config, other) == (reading, own) and not reading.streaming]
        sample = RowSample() if samples else None
        new = shared[0] if shared else load_datasets(
            job.data, requested, tokenizer, is_encoder_decoder, own, log, sample
        )  # fmt: skip
        loaded.append((reading, own, new))
    return [datasets for *_, datasets in loaded]


def _encoded(dataset: Datasets) -> list[Any]:
    """All texts that are encoded so far: an example of alignment may have several."""
    items = (*(dataset.preview or dataset.train), *dataset.validation, *dataset.test)
    return [row for item in items for row in rows_of(item)]


def _fit_datasets(
    kit: Kit, job_configs: Sequence[RunConfig], requested: str | Task, hf_config: Any, tokenizer: Any,
    datasets: Sequence[Datasets], before: Sequence[TextLengths], log: Callable[[str], None], samples: bool,
) -> tuple[list[Datasets], list[TextLengths]]:  # fmt: skip
    """The datasets and lengths of the jobs, encoded again where a text is longer than the model reads."""
    fitted, lengths = list(datasets), []
    for job, dataset, own in zip(job_configs, datasets, before, strict=True):
        more_come = bool(dataset.preview) or dataset.sampled_of is not None
        lengths.append(fit_lengths(kit, job.output.name, own, _encoded(dataset), more_come))
    changed = [
        i
        for i, (dataset, own) in enumerate(zip(datasets, lengths, strict=True))
        if own != before[i] and (dataset.preview or are_too_long(_encoded(dataset), own))
    ]
    again = load_all_datasets(
        [job_configs[i] for i in changed], requested, hf_config, tokenizer, [lengths[i] for i in changed], log, samples
    )
    for i, dataset in zip(changed, again, strict=True):
        fitted[i] = dataset
    return fitted, lengths


def common_task(job_configs: Sequence[RunConfig], datasets: Sequence[Datasets]) -> Task:
    """The one task of all jobs; ConfigError where it conflicts with a setting."""
    tasks = {dataset.objective: dataset.task for dataset in datasets}
    if len(tasks) > 1:
        raise ConfigError(f"the jobs of one run share one objective; found {', '.join(sorted(tasks))}: split the run")
    ((name, task),) = tasks.items()
    if name not in TASKS:  # of another table, whose own config is checked there
        return task
    errors = Errors(ConfigError, f"objective={name}, by the data and the model")
    for job in job_configs:
        for conflict in find_conflicts(job.model_copy(update={"objective": name})):
            errors.add(conflict)
    errors.raise_if_any()
    return task


def _load_base(
    config: RunConfig, task: Task, placement: Placement, datasets: Sequence[Datasets], hf_config: Any,
    pad_token_id: int | None,
) -> LoadedBase:  # fmt: skip
    """The base of all jobs: labels of the first one, attention by the usual length of an example."""
    lengths = sorted(
        item.length for dataset in datasets for item in (dataset.preview or dataset.train) if not task.reads_images
    )
    is_missing = task.needs_pad_id and hf_config.get_text_config().pad_token_id is None
    return load_base(
        config.model,
        task,
        placement,
        datasets[0].label_names,
        lengths[len(lengths) // 2] if lengths else 0,
        pad_token_id if is_missing else None,
        config.per_job()[0].data.image_size if task.reads_images else None,
    )


def _set_language_of_targets(base: LoadedBase, job_configs: Sequence[RunConfig], datasets: Sequence[Datasets]) -> None:
    """The model starts to write in the language of the targets, in training, scoring and generation.

    ConfigError for jobs of several target languages, as the model has one.
    """
    targets = {job.output.name: one.languages.target for job, one in zip(job_configs, datasets, strict=True)
               if one.languages is not None}  # fmt: skip
    if len(set(targets.values())) > 1:
        names = ", ".join(f"{name}: {language}" for name, language in targets.items())
        raise ConfigError(f"the jobs of one run write one language (data.tgt_lang); found {names}: split the run")
    languages = datasets[0].languages
    if languages is not None:
        set_target_language(base.kit, languages)


def _warn_of_new_heads(base: LoadedBase, dataset: Datasets) -> list[str]:
    if not (base.new_heads and dataset.label_names):
        return []
    majority = f" ({100 * dataset.majority_accuracy:.1f} % of the test split)" if dataset.majority_accuracy else ""
    instead = f"results are compared with always giving the most frequent one{majority} instead"
    return [f"the base has an untrained head for these labels, at chance level: {instead}"]


def _add_adapter(base: LoadedBase, job_config: RunConfig, task: Task, dataset: Datasets, parent: Parent | None) -> None:
    """Adds the job's adapter to the kit, new or as its parent left it."""
    name, train = job_config.output.name, job_config.train
    heads = build_heads(base.heads, base.new_heads, len(dataset.label_names) or 1, train.seed, train.head)
    if task.build_heads is not None:
        heads = task.build_heads(base.kit, train.seed)
    if parent is None:
        base.kit.add(name, job_config.method.without_start(), seed=train.seed, heads=heads)
    else:
        load_parent(base.kit, name, parent, job_config.method, heads, dataset.label_names, task.build_heads is not None)


def _build_job(
    base: LoadedBase, job_config: RunConfig, task: Task, dataset: Datasets, pad_token_id: int | None,
    schedule: Schedule, max_length: int,
) -> Job:  # fmt: skip
    """Plans what each of the job's steps trains on."""
    train = schedule.train
    pack_width = max_length if train.packing else 0
    settings = ObjectiveSettings(pad_token_id, pack_width, dataset.images)
    if task.reads_images:
        settings = ObjectiveSettings(images=dataset.images, pixels=_pixel_processor(job_config))
    objective = task.build_objective(base.kit, settings)
    batches = _plan_steps(dataset, objective, schedule)
    return Job(job_config.output.name, objective, dataset.train, batches, train, dataset.validation)


def _pixel_processor(job_config: RunConfig) -> Any:
    from kitout.data.images.augment import Augment
    from kitout.data.images.pixels import PixelProcessor

    config, augment = job_config.data.augment, None
    if config != AugmentConfig():
        augment = Augment(config.min_crop, config.horizontal_flip, config.rotate, config.color_jitter)
    return PixelProcessor.from_pretrained(resolve_model(job_config.model.name), job_config.data.image_size, augment)


def _plan_steps(dataset: Datasets, objective: Objective, schedule: Schedule) -> list[list[int]]:
    size, steps, settings = schedule.batch_size, schedule.num_steps, schedule.train
    if steps * size > MAX_PLANNED_EXAMPLES:
        raise ConfigError(
            f"{steps:,} steps of train.batch_size={size:,} are more than the {MAX_PLANNED_EXAMPLES:,} "
            "examples that one run plans: choose fewer train.steps or train.epochs"
        )
    if dataset.preview:
        return [list(range(s * size, (s + 1) * size)) for s in range(steps)]
    plan = plan_batches(
        [objective.num_tokens(item) for item in dataset.train],
        size,
        steps if dataset.sampled_of is None else min(steps, SAMPLED_STEPS),
        settings.seed,
        settings.group_by_length,
        dataset.mixture_ranges or None,
        dataset.mixture_weights or None,
    )
    return plan if len(plan) == steps else [plan[step % len(plan)] for step in range(steps)]
