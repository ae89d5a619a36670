"""A checked config from plain values: the schema, then settings that contradict each other, all errors at once.

`load` is the one way from YAML, JSON, the command line or a form to a `RunConfig`. It opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kitout.errors import ConfigError, Errors
from kitout.train.config.conflicts import find_conflicts
from kitout.train.config.error_messages import explain
from kitout.train.config.plain_values import check_size
from kitout.train.config.schema import RunConfig

MAX_MESSAGES = 20  # of one config


def load(values: Mapping[str, Any]) -> RunConfig:
    """A checked config from plain values (YAML, JSON, a form). ConfigError names every error at once."""
    errors = Errors(ConfigError, "the run's config")
    check_size(values, "the run's config")
    try:
        config = RunConfig.model_validate(dict(values))
    except ValidationError as error:
        messages = explain(error, RunConfig)
        for message in messages[:MAX_MESSAGES]:
            errors.add(message)
        if len(messages) > MAX_MESSAGES:
            errors.add(f"and {len(messages) - MAX_MESSAGES:,} more")
        errors.raise_if_any()
        raise
    for conflict in dict.fromkeys(conflict for run in config.per_job() for conflict in find_conflicts(run)):
        errors.add(conflict)
    errors.raise_if_any()
    return config
