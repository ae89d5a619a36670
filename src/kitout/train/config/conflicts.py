"""Settings that are fine alone and contradict each other: told before a model is loaded, all at once.

`contradictions` needs the config alone, `machine` also what this machine has. What needs the model or the data is the
pre-flight's business.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from kitout.errors import ConfigError, Errors
from kitout.methods import VPT, PromptTuning
from kitout.train.config.schema import RunConfig

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}  # packages that serve; else the one of its name
PACKABLE_OBJECTIVES = ("auto", "causal_lm")  # objectives under which several examples can share a row


def find_conflicts(config: RunConfig) -> list[str]:
    """Of one run (not of its jobs). Asked again once "auto" is resolved, it may know more."""
    return [*_method_conflicts(config), *_training_conflicts(config), *_image_conflicts(config)]


def _image_conflicts(config: RunConfig) -> Iterator[str]:
    data, train = config.data, config.train
    if config.objective not in ("auto", "image_classification"):
        for name, said in (("data.augment", data.augment != type(data.augment)()),
                           ("train.head", train.head != "linear"), ("train.trunk", train.trunk != "off")):  # fmt: skip
            if said:
                yield f"{name} is for images, not for objective={config.objective}: leave it out"
    if train.head == "batchnorm":
        if train.batch_size < 2:
            yield "train.head=batchnorm has no variance over one image: say train.batch_size=2 or more"
        if train.micro_batch_size is not None and train.micro_batch_size < train.batch_size:
            yield (
                f"train.head=batchnorm takes its statistics over a whole batch: leave train.micro_batch_size="
                f"{train.micro_batch_size} out"
            )


def _method_conflicts(config: RunConfig) -> Iterator[str]:
    name, objective = type(config.method).__name__, config.objective
    if isinstance(config.method, VPT) and objective not in ("auto", "image_classification"):
        yield f"method={name} puts tokens among an image's patches; with objective={objective} say method=PromptTuning"
    if isinstance(config.method, PromptTuning):
        if objective == "image_classification":
            yield f"method={name} puts tokens before a text; with objective=image_classification say method=VPT"
        if config.train.packing:
            yield f"train.packing puts several examples in one row, where method={name} has one place for its tokens"


def _training_conflicts(config: RunConfig) -> Iterator[str]:
    data, train, evaluate = config.data, config.train, config.evaluate
    if config.model.dtype == "float16" and config.model.device == "cpu":
        yield "model.dtype=float16 overflows in training and is slow on a CPU: say bfloat16, float32 or auto"
    if config.model.attention == "flash_attention_2" and config.model.device == "cpu":
        yield "model.attention=flash_attention_2 needs a GPU: say auto, or leave model.device out"
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        yield "model.attention=flash_attention_2 computes in bfloat16 or float16: model.dtype=float32 cannot be"
    if train.packing and config.objective not in PACKABLE_OBJECTIVES:
        yield f"train.packing is for language models (objective=causal_lm), not for objective={config.objective}"
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        yield (
            f"train.micro_batch_size={train.micro_batch_size} is more than the "
            f"train.batch_size={train.batch_size} it is a part of"
        )
    if evaluate.prove_merge and train.fsdp:
        yield "evaluate.prove_merge needs the whole base in every process, and train.fsdp divides it: leave one out"
    if data.streaming and train.steps is None:
        yield "data.streaming has no end that is known beforehand: say train.steps"
    watched = data.validation != 0 and evaluate.steps != 0
    if not watched:
        why = "data.validation=0" if data.validation == 0 else "evaluate.steps=0"
        if train.early_stopping_patience is not None:
            yield (
                f"train.early_stopping_patience={train.early_stopping_patience} waits for a better measurement, "
                f"and {why} means that there is none"
            )
        if evaluate.best_metric is not None:
            yield (
                f"evaluate.best_metric={evaluate.best_metric} chooses by measurements, and {why} means that "
                "there is none"
            )


def check_machine(config: RunConfig, has_cuda: bool) -> None:
    """ConfigError if this machine cannot do what is asked. cuda: whether it has a GPU that torch sees."""
    faults = Errors(ConfigError, "the run's config on this machine")
    for tracker in config.output.report_to:
        if not any(importlib.util.find_spec(name) for name in TRACKERS.get(tracker, (tracker,))):
            faults.add(f"output.report_to={tracker}: it is not installed here: pip install {tracker}, or leave it out")
    if config.model.device == "cuda" and not has_cuda:
        faults.add("model.device=cuda, but torch sees no GPU here: say cpu or auto")
    elif config.model.device == "auto" and not has_cuda:
        alone = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        for fault in find_conflicts(alone):
            faults.add(f"{fault} (torch sees no GPU here)" if fault.startswith("model.") else fault)
    faults.raise_if_any()
