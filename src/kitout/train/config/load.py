"""A checked config from plain values: the schema, then settings that contradict each other, all errors at once.

`load` is the one way from YAML, JSON, the command line or a form to a `RunConfig`. It opens no file. Where no method
has settings of its own to check, an error is found before torch is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from kitout.errors import ConfigError, Errors
from kitout.train.config.conflicts import find_conflicts, find_unused
from kitout.train.config.error_messages import explain
from kitout.train.config.method_field import DEFAULT_METHOD, names_a_method
from kitout.train.config.plain_values import check_size
from kitout.train.config.schema import WITHOUT_METHODS, RunConfig

MAX_MESSAGES = 20  # of one config


def load(values: Mapping[str, Any], log: Callable[[str], None] | None = None) -> RunConfig:
    """A checked config from plain values (YAML, JSON, a form). ConfigError names every error at once.

    log: gets a line before torch is loaded, if it is not yet.
    """
    check(values)
    if log is not None and "torch" not in sys.modules:
        log("loading torch ...")
    config = _validate(values)
    errors = Errors(ConfigError, "the run's config")
    for conflict in dict.fromkeys(conflict for run in config.per_job() for conflict in find_conflicts(run)):
        errors.add(conflict)
    for conflict in find_unused(config):
        errors.add(conflict)
    errors.raise_if_any()
    return config


def check(values: Mapping[str, Any]) -> None:
    """ConfigError for what can be found out without the methods; nothing is checked where they have settings."""
    check_size(values, "the run's config")
    if has_method_names_alone(values):
        _validate({"method": DEFAULT_METHOD, **values}, WITHOUT_METHODS)


def _validate(values: Mapping[str, Any], context: object = None) -> RunConfig:
    errors = Errors(ConfigError, "the run's config")
    try:
        return RunConfig.model_validate(dict(values), context=context)
    except ValidationError as error:
        messages = explain(error, RunConfig)
        for message in messages[:MAX_MESSAGES]:
            errors.add(message)
        if len(messages) > MAX_MESSAGES:
            errors.add(f"and {len(messages) - MAX_MESSAGES:,} more")
        errors.raise_if_any()
        raise


def has_method_names_alone(values: Mapping[str, Any]) -> bool:
    """Every method of the run and its jobs is left out or a name that is known: nothing of it can be wrong."""
    jobs = values.get("jobs")
    runs = [values, *(jobs if isinstance(jobs, list | tuple) else ())]
    found = [run.get("method", DEFAULT_METHOD) for run in runs if isinstance(run, Mapping)]
    names = [one["name"] if isinstance(one, Mapping) and list(one) == ["name"] else one for one in found]
    return all(isinstance(name, str) and names_a_method(name) for name in names)
