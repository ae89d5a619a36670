"""Which designs are tried next: Optuna's TPE, or NSGA-II where the metric is traded against something.

Every generation is asked of a new study that holds all results so far, so a search that was stopped goes on as if it
had not been. It knows a space and numbers, and neither models nor budgets.
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kitout.errors import ConfigError
from kitout.install_hint import suggest_install
from kitout.method import Method
from kitout.search.plan.schema import SearchPlan
from kitout.search.plan.space import Choices, SpaceConfig

METHOD, LR = "method", "lr"
LR_DIGITS = 3  # of a proposed learning rate
ASKED_PER_DESIGN = 20  # most proposals for one design that may be tried


def check_optuna() -> None:
    """ConfigError where it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            f"designs are proposed by Optuna, which is not installed\n  {suggest_install(extra='search')}"
        )


def propose(
    plan: SearchPlan, generation: int, results: Sequence[tuple[Mapping[str, Any], Sequence[float]]], most: int
) -> Iterator[tuple[dict[str, Any], Method, float]]:
    """Designs as (params, method, learning rate), endlessly but for `most` times ASKED_PER_DESIGN.

    results: params and values of what was measured, larger is better for the first and smaller for the others.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    maximize, minimize = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    directions = [maximize, *(minimize for _ in plan.goal.against)]
    study = optuna.create_study(directions=directions, sampler=_sampler(plan, generation))
    for params, values in results:
        if params and all(map(math.isfinite, values)):
            distributions = {name: one for name, one in _distributions(plan.space).items() if name in params}
            study.add_trial(
                optuna.trial.create_trial(params=dict(params), distributions=distributions, values=list(values))
            )
    for _ in range(most * ASKED_PER_DESIGN):
        trial = study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            params = _draw(trial, plan.space)
        try:
            method = plan.space.build(params[METHOD], _settings(params, plan.space))
        except ValueError:  # settings that this method does not take together
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        yield params, method, learning_rate(method, params[LR])


def learning_rate(method: Method, multiplier: float) -> float:
    """The method's own times the multiplier, in few digits."""
    return float(f"{method.training_defaults().lr * multiplier:.{LR_DIGITS}g}")


def params_of(method: Method, lr: float, space: SpaceConfig) -> dict[str, Any]:
    """A design as values of the space; empty where it lies outside."""
    low, high = space.lr.ends
    multiplier = lr / method.training_defaults().lr
    if not low * 0.999 <= multiplier <= high * 1.001:
        return {}
    for name in space.method:
        plain = space.build(name, {})
        choices = space.choices_of(name)
        if type(plain) is not type(method):
            continue
        values = method.model_dump(mode="json")
        rest = {k: v for k, v in plain.model_dump(mode="json").items() if k not in choices}
        if rest != {k: v for k, v in values.items() if k not in choices}:
            continue
        encoded = {setting: _encode(values[setting], one) for setting, one in choices.items()}
        if all(value is not None for value in encoded.values()):
            own = {_key(name, setting): value for setting, value in encoded.items()}
            return {METHOD: name, **own, LR: min(high, max(low, multiplier))}
    return {}


def _sampler(plan: SearchPlan, generation: int) -> Any:
    import optuna

    seed = (plan.seed * 1_000_003 + generation) % 2**32
    if plan.goal.against:
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, plan.candidates // 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(1, plan.candidates // 2), constant_liar=True, multivariate=True, group=True
        )


def _key(name: str, setting: str) -> str:
    return f"{name}.{setting}"


def _draw(trial: Any, space: SpaceConfig) -> dict[str, Any]:
    params: dict[str, Any] = {METHOD: trial.suggest_categorical(METHOD, list(space.method))}
    for setting, choices in space.choices_of(params[METHOD]).items():
        key = _key(params[METHOD], setting)
        if not choices.is_range:
            params[key] = trial.suggest_categorical(key, list(choices.by_text))
        elif choices.is_whole:
            params[key] = trial.suggest_int(key, *choices.values, log=choices.is_log)
        else:
            params[key] = trial.suggest_float(key, *choices.values, log=choices.is_log)
    params[LR] = trial.suggest_float(LR, *space.lr.ends, log=True)
    return params


def _distributions(space: SpaceConfig) -> dict[str, Any]:
    """Of every value of the space, by its name."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {METHOD: CategoricalDistribution(list(space.method))}
    for name in space.method:
        for setting, choices in space.choices_of(name).items():
            if not choices.is_range:
                found[_key(name, setting)] = CategoricalDistribution(list(choices.by_text))
            else:
                kind: Any = IntDistribution if choices.is_whole else FloatDistribution
                found[_key(name, setting)] = kind(*choices.values, log=choices.is_log)
    return found | {LR: FloatDistribution(*space.lr.ends, log=True)}


def _settings(params: Mapping[str, Any], space: SpaceConfig) -> dict[str, Any]:
    name = params[METHOD]
    return {
        setting: params[_key(name, setting)] if choices.is_range else choices.by_text[params[_key(name, setting)]]
        for setting, choices in space.choices_of(name).items()
    }


def _encode(value: Any, choices: Choices) -> Any:
    """As the study holds it; None where the setting has no such value."""
    if choices.is_range:
        low, high = choices.values
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and low <= value <= high else None
    text = json.dumps(value)
    return text if text in choices.by_text else None
