"""Settings that are fine alone and contradict each other: reported before a model is loaded, all at once.

`find_conflicts` needs the config alone, `check_machine` also what this machine has. What needs the model or the data is
the pre-flight's business.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from kitout.errors import ConfigError, Errors
from kitout.install_hint import suggest_install
from kitout.train.config.schema import DEFAULT_BATCH_SIZE, RunConfig
from kitout.train.objectives.tasks import TASKS

OF_THE_WHOLE_RUN = (
    "micro_batch_size", "activation_checkpointing", "trunk_bytes", "early_stopping_patience", "save_steps",
    "keep_checkpoints", "fsdp",
)  # fmt: skip
"""Of train: jobs share the forwards, the checkpoints and the end, so none has one of its own."""
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}  # packages that serve; else the one of its name


def find_conflicts(config: RunConfig) -> list[str]:
    """Of one run (not of its jobs). Called again once "auto" is resolved, it may find more."""
    return [*_method_conflicts(config), *conflicts_without_method(config)]


def conflicts_without_method(config: RunConfig) -> list[str]:
    """Those that need no method, and so no torch."""
    return [*_training_conflicts(config), *_image_conflicts(config), *_group_conflicts(config)]


def find_unused(config: RunConfig) -> Iterator[str]:
    """Of a run with all its jobs: what none of them takes."""
    used = {part for run in config.per_job() for part in run.method.part_names()}
    unused = [name for name in config.model.adapters if name not in used]
    if unused and not any(run.train.from_ for run in config.per_job()):
        yield (
            f"model.adapters names {', '.join(unused)}, and no method is made of it: write a composition, "
            f"method={{name: Mixture, of: [{', '.join(config.model.adapters)}]}}, or leave it out"
        )


def find_misplaced(config: RunConfig) -> Iterator[str]:
    """Of a run with all its jobs: what is set for one of them and can only hold for all."""
    for job in config.jobs:
        own = set() if job.train is None else job.train.model_fields_set
        for name in OF_THE_WHOLE_RUN:
            if name in own and getattr(job.train, name) != getattr(config.train, name):
                yield (
                    f"train.{name} of the job {job.name}: jobs of one run share it, write it in the run's own train "
                    f"section, which has {getattr(config.train, name)}"
                )


def _image_conflicts(config: RunConfig) -> Iterator[str]:
    data, train, batch_size = config.data, config.train, config.train.batch_size or DEFAULT_BATCH_SIZE
    if config.objective != "auto" and not TASKS[config.objective].reads_images:
        set_by_user = {
            "data.augment": data.augment != type(data.augment)(),
            "train.head": train.head != "linear",
        }
        for name, is_set in set_by_user.items():
            if is_set:
                yield f"{name} is for images, not for objective={config.objective}: leave it out"
    if train.head == "batchnorm":
        if batch_size < 2:
            yield "train.head=batchnorm has no variance over one image: choose train.batch_size=2 or more"
        if train.micro_batch_size is not None and train.micro_batch_size < batch_size:
            yield (
                f"train.head=batchnorm takes its statistics over a whole batch: leave train.micro_batch_size="
                f"{train.micro_batch_size} out"
            )


def _method_conflicts(config: RunConfig) -> Iterator[str]:
    from kitout.methods import VPT, PromptTuning  # with torch: a config that has its method has loaded it

    name, task = type(config.method).__name__, TASKS.get(config.objective)
    missing = [part for part in config.method.part_names() if part not in config.model.adapters]
    if missing and config.train.from_ is None:  # whose folder has its parts
        folders = ", ".join(f"{part}: runs/{part}/adapter" for part in missing)
        yield (
            f"method={name} is made of {', '.join(missing)}, which model.adapters does not name: write the folders of "
            f"these adapters, model.adapters={{{folders}}}"
        )
    if config.output.name in config.model.adapters:
        yield (f"output.name={config.output.name} is also the name of one of model.adapters: choose another for one")
    if isinstance(config.method, VPT) and task is not None and not task.reads_images:
        yield (
            f"method={name} puts virtual tokens among an image's patches; with objective={config.objective} choose "
            "method=PromptTuning"
        )
    if isinstance(config.method, PromptTuning):
        if task is not None and task.reads_images:
            yield (
                f"method={name} puts virtual tokens before a text; with objective={config.objective} choose method=VPT"
            )
        if config.train.packing:
            yield (
                f"train.packing puts several examples in one row, where method={name} has one place for its virtual "
                "tokens"
            )


def _group_conflicts(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.group is not None and data.streaming:
        yield f"data.group={data.group} keeps groups in one split, which a stream cannot: leave data.streaming out"
    if data.group is not None and config.objective in TASKS and TASKS[config.objective].reads_images:
        yield f"data.group={data.group} is for rows of text, and images are not read in groups: leave it out"


def _training_conflicts(config: RunConfig) -> Iterator[str]:
    data, train, evaluate = config.data, config.train, config.evaluate
    batch_size = train.batch_size or DEFAULT_BATCH_SIZE
    if config.model.dtype == "float16" and config.model.device == "cpu":
        yield "model.dtype=float16 overflows in training and is slow on a CPU: choose bfloat16, float32 or auto"
    if config.model.attention == "flash_attention_2" and config.model.device == "cpu":
        yield "model.attention=flash_attention_2 needs a GPU: choose auto, or leave model.device out"
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        yield "model.attention=flash_attention_2 computes in bfloat16 or float16, not in model.dtype=float32"
    if train.packing and config.objective != "auto" and not TASKS[config.objective].packable:
        packable = ", ".join(name for name, task in TASKS.items() if task.packable)
        yield f"train.packing is for language models (objective={packable}), not for objective={config.objective}"
    if (data.src_lang or data.tgt_lang) and config.objective not in ("auto", "seq2seq_lm"):
        yield f"data.src_lang and data.tgt_lang are for objective=seq2seq_lm, not for objective={config.objective}"
    if train.micro_batch_size is not None and train.micro_batch_size > batch_size:
        yield (
            f"train.micro_batch_size={train.micro_batch_size} is more than the "
            f"train.batch_size={batch_size} it is a part of"
        )
    yield from _compile_conflicts(config)
    if evaluate.prove_merge and train.fsdp:
        yield "evaluate.prove_merge needs the whole base in every process, and train.fsdp shards it: leave one out"
    if data.streaming and train.steps is None:
        yield "data.streaming has no end that is known beforehand: train.steps is required"
    if data.validation == 0 or evaluate.steps == 0:
        cause = "data.validation=0" if data.validation == 0 else "evaluate.steps=0"
        if train.early_stopping_patience is not None:
            yield (
                f"train.early_stopping_patience={train.early_stopping_patience} waits for a better evaluation, "
                f"and {cause} means that there is none"
            )
        if evaluate.best_metric is not None:
            yield (
                f"evaluate.best_metric={evaluate.best_metric} chooses by evaluations, and {cause} means that "
                "there is none"
            )


def _compile_conflicts(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.pad_to and config.objective in TASKS and TASKS[config.objective].reads_images:
        yield f"train.pad_to is for texts, and images are all of one size (objective={config.objective}): leave it out"
    if train.compile == "off":
        return
    if train.fsdp:
        yield "train.compile=blocks needs a block's whole weights, and train.fsdp shards them: leave one out"
    if config.model.quantization != "none":
        yield (
            f"train.compile=blocks compiles floating point weights, not those of model.quantization="
            f"{config.model.quantization}: leave one out"
        )
    if config.data.streaming and not train.pad_to:
        yield (
            "train.compile=blocks chooses lengths to pad to from all batches, which data.streaming does not know: "
            "write some, such as train.pad_to=[128, 256, 512]"
        )
    if train.packing:
        yield (
            "train.packing makes another number of rows of each batch, and train.compile=blocks a graph for each: "
            "leave one out"
        )


def check_machine(config: RunConfig, has_cuda: bool) -> None:
    """ConfigError if this machine cannot do what is requested. has_cuda: whether it has a GPU that torch sees."""
    errors = Errors(ConfigError, "the run's config on this machine")
    for tracker in config.output.report_to:
        if not any(importlib.util.find_spec(name) for name in TRACKERS.get(tracker, (tracker,))):
            errors.add(f"output.report_to={tracker}: it is not installed: {suggest_install(tracker)}, or leave it out")
    if any(job.train.compile != "off" for job in config.per_job()):
        from kitout.runtime.graphs.compile_blocks import find_missing_compiler  # with torch

        if problem := find_missing_compiler("inductor", "cuda" if has_cuda and config.model.device != "cpu" else "cpu"):
            errors.add(f"train.compile=blocks: {problem}, or write train.compile=off, which gives the same run")
    if config.model.device == "cuda" and not has_cuda:
        errors.add("model.device=cuda, but torch sees no GPU here: choose cpu or auto")
    elif config.model.device == "auto" and not has_cuda:
        on_cpu = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        for conflict in find_conflicts(on_cpu):
            errors.add(f"{conflict} (torch sees no GPU here)" if conflict.startswith("model.") else conflict)
    errors.raise_if_any()
