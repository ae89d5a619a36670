"""A checked config from plain values: the schema, then settings that contradict each other, all errors at once.

`load` is the one way from YAML, JSON, the command line or a form to a `RunConfig`. It opens no file. Where no method
has settings of its own to check, an error is found before torch is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from kitout.errors import ConfigError, Errors
from kitout.train.config.conflicts import find_conflicts, find_misplaced, find_unused
from kitout.train.config.error_messages import AdviceAt, explain
from kitout.train.config.method_field import DEFAULT_METHOD, names_a_method
from kitout.train.config.plain_values import check_size
from kitout.train.config.schema import WITHOUT_METHODS, ConfigSection, RunConfig

MAX_MESSAGES = 20  # of one config

Schema = TypeVar("Schema", bound=ConfigSection)
Run = TypeVar("Run", bound=RunConfig)


def load(values: Mapping[str, Any], log: Callable[[str], None] | None = None) -> RunConfig:
    """A checked config from plain values (YAML, JSON, a form). ConfigError names every error at once.

    log: gets a line before torch is loaded, if it is not yet.
    """
    check(values)
    announce_torch(log)
    return load_as(values, RunConfig)


def load_as(values: Mapping[str, Any], schema: type[Run]) -> Run:
    """The same as a class that holds more than a run has; torch is loaded without a word."""
    check_size(values, "the run's config")
    config = validate(values, schema)
    errors = Errors(ConfigError, "the run's config")
    for conflict in dict.fromkeys(conflict for run in config.per_job() for conflict in find_conflicts(run)):
        errors.add(conflict)
    for conflict in (*find_misplaced(config), *find_unused(config)):
        errors.add(conflict)
    errors.raise_if_any()
    return config


def announce_torch(log: Callable[[str], None] | None) -> None:
    """A line before torch is loaded, if it is not yet."""
    if log is not None and "torch" not in sys.modules:
        log("loading torch ...")


def check(values: Mapping[str, Any]) -> None:
    """ConfigError for what can be found out without the methods; nothing is checked where they have settings."""
    check_size(values, "the run's config")
    if has_method_names_alone(values):
        validate({"method": DEFAULT_METHOD, **values}, RunConfig, WITHOUT_METHODS)


def validate(
    values: Mapping[str, Any], schema: type[Schema], context: object = None, heading: str = "the run's config",
    advice_at: AdviceAt | None = None,
) -> Schema:  # fmt: skip
    """Plain values by a schema; ConfigError names every error at once, in words. advice_at: as `explain` takes it."""
    errors = Errors(ConfigError, heading)
    try:
        return schema.model_validate(dict(values), context=context)
    except ValidationError as error:
        for message in explain(error, schema, advice_at):
            errors.add(message)
        errors.shorten(MAX_MESSAGES, "errors")
        errors.raise_if_any()
        raise


def has_method_names_alone(values: Mapping[str, Any]) -> bool:
    """Every method of the run, its jobs and its stages is left out or a known name: nothing of it can be wrong."""
    entries = [values.get(group) for group in ("jobs", "stages")]
    runs = [values, *(one for group in entries if isinstance(group, list | tuple) for one in group)]
    found = [run.get("method", DEFAULT_METHOD) for run in runs if isinstance(run, Mapping)]
    names = [one["name"] if isinstance(one, Mapping) and list(one) == ["name"] else one for one in found]
    return all(isinstance(name, str) and names_a_method(name) for name in names)
