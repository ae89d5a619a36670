"""A checked config of stages from plain values: the schema, then what contradicts itself, all errors at once.

A file holds `stages`, or the settings of one stage at its top with its `kind`: then errors name them as they stand
there. It opens no file but a run.yaml that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from kitout.align.config.conflicts import find_conflicts, method_conflicts
from kitout.align.config.schema import KIND_ADVICE, AlignConfig
from kitout.errors import ConfigError, Errors
from kitout.train.config import conflicts, overrides
from kitout.train.config.load import announce_torch, has_method_names_alone, validate
from kitout.train.config.plain_values import check_size
from kitout.train.config.schema import WITHOUT_METHODS
from kitout.train.config.yaml_file import read_yaml

HEADING = "the run's config"
SHORTHANDS = overrides.SHORTHANDS | {
    "output": "folder",
    "reward": "source",
    "reward.*": "source",
    **{f"stages.*.{name}": key for name, key in overrides.SHORTHANDS.items() if name.partition(".")[0] != "jobs"},
    "stages.*.reward": "source",
    "stages.*.reward.*": "source",
}
OF_A_RUN = {"objective", "jobs"}  # what the run.yaml of a stage's own folder holds besides


def read_values(config: AlignConfig | Mapping[str, Any] | str | PathLike[str] | None) -> dict[str, Any]:
    """The plain values of a config, a mapping, a file, or none."""
    if isinstance(config, AlignConfig):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    return {} if config is None else read_yaml(Path(config))


def build_align(
    file: Path | None,
    settings: Iterable[overrides.Override | str],
    kind: str | None = None,
    log: Callable[[str], None] | None = None,
) -> AlignConfig:
    """The stages that a file (None: none) and settings describe; the later wins. kind: of one stage alone."""
    values = read_values(file)
    if kind is not None and "stages" in values:
        raise ConfigError(f"{file} holds stages of its own: leave {kind} out, or name a file without stages")
    values |= {} if kind is None else {"kind": kind}
    return overrides.build(values, settings, lambda values: load_align(values, log), check_align, SHORTHANDS)


def load_align(values: Mapping[str, Any], log: Callable[[str], None] | None = None) -> AlignConfig:
    """Checked stages from plain values (YAML, JSON, a form). ConfigError names every error at once.

    log: gets a line before torch is loaded, if it is not yet.
    """
    check_align(values)
    announce_torch(log)
    return _load(values, None)


def check_align(values: Mapping[str, Any]) -> None:
    """ConfigError for what can be found out without the methods; nothing is checked where they have settings."""
    check_size(values, HEADING)
    if has_method_names_alone(values):
        _load(values, WITHOUT_METHODS)


def _load(values: Mapping[str, Any], context: object) -> AlignConfig:
    """The stages; context: WITHOUT_METHODS, for all that they need no method for."""
    is_single = "kind" in values and "stages" not in values
    try:
        staged = _as_stages(values) if is_single else values
        config = validate(staged, AlignConfig, context, advice_at=KIND_ADVICE.within(staged))
        errors = Errors(ConfigError, HEADING)
        for message in dict.fromkeys(_conflicts(config, context)):
            errors.add(message)
        errors.raise_if_any()
        return config
    except ConfigError as error:
        if is_single:
            raise ConfigError(str(error).replace("stages.0.", "")) from error
        raise


def _as_stages(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one stage, at the top of a file, as a list of one. The run.yaml of a stage's folder is one."""
    shared = {key: values[key] for key in ("model", "output") if key in values}
    stage = {key: value for key, value in values.items() if key not in shared}
    output, train = shared.get("output"), stage.get("train")
    if stage.keys() >= OF_A_RUN and isinstance(output, Mapping) and isinstance(train, Mapping):
        stage = {key: value for key, value in stage.items() if key not in OF_A_RUN}
        shared["output"] = {key: value for key, value in output.items() if key != "name"}
        stage |= {"name": output.get("name"), "from": train.get("from")}
        own = ("from", "batch_size") if stage.get("rollout") else ("from",)
        stage["train"] = {key: value for key, value in train.items() if key not in own}
    return {**shared, "stages": [stage]}


def _conflicts(config: AlignConfig, context: object) -> Iterable[str]:
    yield from find_conflicts(config)
    if context is None:
        yield from method_conflicts(config)
    runs = list(config.runs(context))
    for run in runs:
        heading = f"stage {run.output.name}: " if len(runs) > 1 else ""
        checked, batch_size = run, ""
        if run.rollout is not None:  # a step trains on every answer
            checked = run.with_answers_as_batch()
            batch_size = f"rollout.prompts={run.rollout.prompts} x rollout.samples={run.rollout.samples} answers"
        found = conflicts.find_conflicts(checked) if context is None else conflicts.conflicts_without_method(checked)
        for conflict in found:
            yield heading + (
                conflict.replace(f"train.batch_size={checked.train.batch_size}", batch_size) if batch_size else conflict
            )
    if context is None:  # adapters that no stage is made of
        yield from set.intersection(*(set(conflicts.find_unused(run)) for run in runs))
