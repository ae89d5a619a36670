"""`evaluate.forgetting`: after training, a suite of sets that the adapters were not trained for, base against adapters.

The sets, the base's kept answers and the verdicts are those of `kitout eval` (`evaluate.sets`). It knows a prepared run
and no report.
"""

from __future__ import annotations

from collections.abc import Callable

from kitout.errors import ConfigError
from kitout.evaluate.sets.evaluation_set import Asked
from kitout.evaluate.sets.forgetting import SetChange
from kitout.evaluate.sets.outcome import SetProgressFn, forgetting_of, measure_set
from kitout.evaluate.sets.suites import suite_sets
from kitout.train.config.schema import EvaluateConfig
from kitout.train.setup.base_model import choose_pad_token
from kitout.train.setup.prepare import PreparedRun


def check_forgetting(run: PreparedRun, config: EvaluateConfig) -> None:
    """ConfigError where the model is no decoder that writes text: nothing can be asked of it."""
    if config.forgetting != "none" and run.objective != "causal_lm":
        raise ConfigError(
            f"evaluate.forgetting={config.forgetting} asks a language model (objective=causal_lm), and this run has "
            f"objective={run.objective}: leave it out"
        )


def measure_forgetting(
    run: PreparedRun, config: EvaluateConfig, seed: int, log: Callable[[str], None],
    on_progress: SetProgressFn | None = None,
) -> dict[str, tuple[SetChange, ...]]:  # fmt: skip
    """By job: what its adapter changed on each set. Empty where it is not asked for."""
    if config.forgetting == "none":
        return {}
    asked = Asked(run.kit, run.tokenizer, choose_pad_token(run.kit.config, run.tokenizer))
    routes = {job.name: job.name for job in run.jobs}
    outcomes = []
    for what in suite_sets(config.forgetting, run.tokenizer, seed, log):
        log(f"measuring forgetting on {what.name}, {len(what):,} examples ...")
        outcomes.append(measure_set(asked, what, routes, seed, on_progress=on_progress))
    return {name: forgetting_of(outcomes, name) for name in routes}
