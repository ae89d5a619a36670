"""`evaluate.forgetting`: after training, a suite of sets that the adapters were not trained for, base against adapters.

The sets, the base's kept answers and the verdicts are those of `kitout eval` (`evaluate.sets`). It knows a prepared run
and no report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kitout.errors import ConfigError, Errors
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.sets.evaluation_set import Asked
from kitout.evaluate.sets.forgetting import SetChange
from kitout.evaluate.sets.outcome import forgetting_of, measure_set
from kitout.evaluate.sets.suites import suite_sets
from kitout.train.config.schema import EvaluateConfig
from kitout.train.loop.fsdp import is_sharded
from kitout.train.setup.base_model import choose_pad_token
from kitout.train.setup.prepare import PreparedRun


def check_forgetting(run: PreparedRun, config: EvaluateConfig, seed: int, log: Callable[[str], None]) -> None:
    """Before training: ConfigError where the model cannot be asked the suite; missing data are fetched.

    It has to be a decoder that writes text and reads every choice of its questions, under every adapter that is
    trained. seed: of the questions that are drawn.
    """
    if config.forgetting == "none":
        return
    if (run.task.used_as or run.objective) != "causal_lm":
        raise ConfigError(
            f"evaluate.forgetting={config.forgetting} asks a language model (objective=causal_lm), and this run has "
            f"objective={run.objective}: leave it out"
        )
    asked, routes = _asked(run), [None, *(job.name for job in run.jobs)]
    errors = Errors(ConfigError, f"evaluate.forgetting={config.forgetting}")
    for what in suite_sets(config.forgetting, run.tokenizer, seed, log):
        try:
            what.check(asked, routes)
        except ConfigError as error:
            errors.add(f"{what.name}: {error}")
    if errors.messages:
        errors.add("leave it out; kitout eval asks the adapter sets of your own later")
    errors.raise_if_any()


def measure_forgetting(
    run: PreparedRun, config: EvaluateConfig, seed: int, log: Callable[[str], None],
    progress_of: Callable[[str], ProgressFn],
) -> dict[str, tuple[SetChange, ...]]:  # fmt: skip
    """By job: what its adapter changed on each set. Empty where it is not asked for.

    progress_of: makes what reports the progress on a set.
    """
    if config.forgetting == "none":
        return {}
    asked = _asked(run)
    routes = {job.name: job.name for job in run.jobs}
    outcomes = []
    for what in suite_sets(config.forgetting, run.tokenizer, seed, log):
        log(f"measuring forgetting on {what.name}, {len(what):,} examples ...")
        report = partial(_report, progress_of(what.name))
        # processes that share a sharded base run each forward together, whatever one of them has kept
        keep = not is_sharded(run.kit)
        outcomes.append(measure_set(asked, what, routes, seed, keep, report))
    return {name: forgetting_of(outcomes, name) for name in routes}


def _asked(run: PreparedRun) -> Asked:
    return Asked(run.kit, run.tokenizer, choose_pad_token(run.kit.config, run.tokenizer))


def _report(progress: ProgressFn, _name: str, done: int, total: int) -> None:
    progress(done, total)
