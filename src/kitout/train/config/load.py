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
from kitout.train.config.schema import RunConfig


def load(values: Mapping[str, Any]) -> RunConfig:
    """A checked config from plain values (YAML, JSON, a form). ConfigError names every error at once."""
    faults = Errors(ConfigError, "the run's config")
    try:
        config = RunConfig.model_validate(dict(values))
    except ValidationError as wrong:
        for fault in explain(wrong, RunConfig):
            faults.add(fault)
        faults.raise_if_any()
        raise
    for fault in dict.fromkeys(fault for run in config.per_job() for fault in find_conflicts(run)):
        faults.add(fault)
    faults.raise_if_any()
    return config
