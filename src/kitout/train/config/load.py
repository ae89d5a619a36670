"""A checked config from plain values: the schema, then settings that contradict each other, all errors at once.

`load` is the one way from YAML, JSON, the command line or a form to a `RunConfig`. It opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kitout.errors import ConfigError, Faults
from kitout.train.config.conflicts import contradictions
from kitout.train.config.error_messages import told
from kitout.train.config.schema import RunConfig


def load(values: Mapping[str, Any]) -> RunConfig:
    """A checked config from plain values (YAML, JSON, a form). ConfigError names every error at once."""
    faults = Faults(ConfigError, "the run's config")
    try:
        config = RunConfig.model_validate(dict(values))
    except ValidationError as wrong:
        for fault in told(wrong, RunConfig):
            faults.add(fault)
        faults.raise_if_any()
        raise
    for fault in dict.fromkeys(fault for run in config.alone() for fault in contradictions(run)):
        faults.add(fault)
    faults.raise_if_any()
    return config
