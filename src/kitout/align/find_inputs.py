"""What stages take from outside, by name: the base, data, adapter folders, reward functions and gyms.

Found before anything is loaded, wrong names together. The base and files of data are `train.setup.find_inputs`'s
business; a name that only the hub knows is left to its loader. It runs no function and reads no file but PEFT's config.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from kitout.align.config.gym_name import is_gym
from kitout.align.config.schema import AlignConfig, RewardSource, StageRun
from kitout.errors import ConfigError, KitoutError
from kitout.format import short_repr
from kitout.install_hint import suggest_install
from kitout.train.setup.find_inputs import (
    TASKS_WITH_HEADS,
    adapter_errors,
    find_inputs,
    peft_task,
    raise_together,
)

PEFT_CONFIG = "adapter_config.json"
GYM_PACKAGE, GYM_DISTRIBUTION = "reasoning_gym", "reasoning-gym"


def check_align_inputs(config: AlignConfig, runs: list[StageRun]) -> None:
    """ConfigError for every wrong name at once. runs: those of the stages that are not finished."""
    raise_together([error for run in runs for error in _errors_of(config, run)])


def _errors_of(config: AlignConfig, run: StageRun) -> Iterator[KitoutError]:
    number, stage = next((i, one) for i, one in enumerate(config.stages) if one.name == run.output.name)
    at = f"stages.{number}." if len(config.stages) > 1 else ""
    files = tuple(one for one in run.data.train if not is_gym(one.path))
    gyms = {one.path for one in run.data.train if is_gym(one.path)}
    found = find_inputs(run.model_copy(update={"data": run.data.model_copy(update={"train": files})}))
    if not found.in_doubt:
        yield from found.errors
    if stage.from_ is not None and config.stage(stage.from_) is None:
        yield from _folder_errors(f"{at}from", stage.from_, _texts(config, number))
        if (task := peft_task(stage.from_)) in TASKS_WITH_HEADS:
            yield ConfigError(
                f"{at}from={short_repr(stage.from_)} is a folder of Hugging Face PEFT for {task}, whose head is that "
                f"of another model class; a stage of kind {stage.kind} starts from what was trained on answers "
                f"(CAUSAL_LM): name such a folder, or leave {at}from out"
            )
    for one in stage.reward:
        if one.of == "gym":
            gyms.add(one.source)
        elif one.of == "function":
            yield from _function_errors(f"{at}reward", one)
        elif config.stage(one.source) is None:
            scorers = [before.name for before in config.stages[:number] if not before.of_kind.writes_text]
            if (Path(one.source).expanduser() / PEFT_CONFIG).is_file():
                yield ConfigError(
                    f"{at}reward={short_repr(one.source)} is a folder of Hugging Face PEFT, whose reward models have "
                    "the head of another model class: train one on this base by `kitout align reward` (from takes its "
                    "folder where it is one of answers), or call that model in a function, module:function"
                )
                continue
            yield from _folder_errors(f"{at}reward", one.source, scorers)
    if gyms and importlib.util.find_spec(GYM_PACKAGE) is None:
        yield ConfigError(f"{min(gyms)} needs {GYM_DISTRIBUTION}: {suggest_install(extra='align')}")


def _texts(config: AlignConfig, number: int) -> list[str]:
    """The stages that a stage may start from."""
    stage = config.stages[number]
    return [one.name for one in config.stages[:number] if one.of_kind.writes_text or not stage.of_kind.writes_text]


def _folder_errors(setting: str, text: str, stages: list[str]) -> Iterator[KitoutError]:
    """Of a name that is no stage's, and so an adapter's folder."""
    for error in adapter_errors(setting, text):
        close = get_close_matches(text[:80], stages, n=1, cutoff=0.6)
        if close:
            yield ConfigError(f"{error}; did you mean the stage {close[0]!r}?")
        else:
            before = f"; stages before it: {', '.join(stages)}" if stages else ""
            yield ConfigError(f"{error}{before}")


def _function_errors(setting: str, one: RewardSource) -> Iterator[KitoutError]:
    module, _, name = one.source.partition(":")
    first = module.partition(".")[0]
    is_here = Path(f"{first}.py").is_file() or Path(first).is_dir()
    if not is_here and importlib.util.find_spec(first) is None:
        yield ConfigError(
            f"{setting}={short_repr(one.source)}: there is no module {first}: start in the folder of {first}.py, "
            f"which holds a function {name}(prompts, completions, rows)"
        )
