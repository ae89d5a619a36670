"""The stages one after the other: each is a run of `kitout.train` in its own folder, resumed or finished as one.

It knows the order of stages, and nothing of a step.
"""

from __future__ import annotations

from collections.abc import Callable

from kitout.align.config.schema import AlignConfig
from kitout.train.run import Result
from kitout.train.run import run as run_training

LogFn = Callable[[str], None]


def run(config: AlignConfig, *, dry_run: bool = False, log: LogFn = print) -> Result:
    """Trains what the config describes; the result is the last stage's. dry_run: stops before the first step."""
    result = Result(config.output.folder)
    for stage in config.stages:
        if stage.kind == "sft":
            result = run_training(stage.run_config(config), dry_run=dry_run, log=log)
        else:
            log(f"stage {stage.name}: {stage.kind} is not trained yet")
    return result
