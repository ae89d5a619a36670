"""Tasks of lm-evaluation-harness (the extra `harness`: lm_eval) on a kit, as its base and with each adapter.

A task is a YAML file as lm_eval has them. It may name Python functions, expressions in its templates and metrics that
are fetched: these are code of whoever wrote the file, and run only where that is allowed; otherwise functions and such
metrics are refused, and templates see no more than their row. It knows lm_eval's files and results, and no other sets.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kitout.base.token_limit import trained_length
from kitout.errors import ConfigError, Errors, suggest
from kitout.evaluate.ask.text_limit import num_virtual_tokens
from kitout.evaluate.compare import BASE, compare
from kitout.evaluate.intervals.ratio import Ratio
from kitout.evaluate.metrics.measure import Measure, mean, of_ratio
from kitout.evaluate.sets.outcome import SetOutcome
from kitout.install_hint import suggest_install
from kitout.kit import Kit
from kitout.route import RouteEntry

BATCH_ROWS = 8
OF_SUMS: dict[str, tuple[float, Literal["identity", "exp"]]] = {  # metrics whose examples are (sum log p, units)
    "bits_per_byte": (math.log(2), "identity"),
    "byte_perplexity": (1.0, "exp"),
    "word_perplexity": (1.0, "exp"),
    "perplexity": (1.0, "exp"),  # of answers: an example is sum log p alone, one unit
}


@dataclass(frozen=True)
class HarnessOutcome(SetOutcome):
    """One task. Metrics that are a mean or a ratio over its examples are compared; all are `reported`."""

    reported: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By adapter, and of the base: every number that lm_eval itself gives."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"lm_eval": {name: dict(numbers) for name, numbers in self.reported.items()}}


def read_tasks(files: Sequence[str | Path], allow_code: bool) -> list[dict[str, Any]]:
    """Every task's config, as lm_eval takes it. ConfigError with all that is wrong with any of them."""
    if not files:
        return []
    try:
        from lm_eval.tasks import _yaml_loader
    except ImportError as error:
        raise ConfigError(
            f"tasks of lm-evaluation-harness need lm_eval, not installed here\n  {suggest_install(extra='harness')}"
        ) from error
    errors, tasks = Errors(ConfigError, "harness"), []
    for given in map(Path, files):
        file = given.expanduser()
        try:
            if not allow_code:
                _check_plain(_yaml_loader.yaml, file, set())
            config = _checked(_yaml_loader.load_yaml(file, resolve_func=allow_code), file, allow_code)
            _try_to_build(config, allow_code)
            tasks.append(config)
        except FileNotFoundError as error:
            errors.add(f"{given}: there is no file {error.filename}")
        except (ConfigError, OSError, ValueError, ImportError, AttributeError, _yaml_loader.yaml.YAMLError) as error:
            errors.add(f"{given}: {error}")
    names = [task["task"] for task in tasks]
    errors.messages += [f"two tasks are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    errors.raise_if_any()
    return tasks


def measure_tasks(
    kit: Kit, tokenizer: Any, tasks: Sequence[Mapping[str, Any]], routes: Mapping[str, RouteEntry], seed: int,
    allow_code: bool, log: Callable[[str], None],
) -> list[HarnessOutcome]:  # fmt: skip
    """Each task of the base and under every route; random states are left as they were."""
    if not tasks:
        return []
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # reading every task that lm_eval has takes a minute
    cases: dict[str, RouteEntry] = {BASE: None, **routes}
    window = _window(kit, list(cases.values()))
    results: dict[str, Any] = {}
    with _kept_random_states(), _templates(allow_code):
        for name, route in cases.items():
            log(f"lm_eval: {', '.join(task['task'] for task in tasks)}, {name} ...")
            with kit.use(route):
                model = HFLM(
                    pretrained=kit, tokenizer=tokenizer, device=str(kit.device), batch_size=BATCH_ROWS,
                    max_length=window,
                    softmax_dtype="float32",
                )  # fmt: skip
                results[name] = simple_evaluate(
                    model, tasks=[dict(task) for task in tasks], bootstrap_iters=0, task_manager=manager,
                    confirm_run_unsafe_code=allow_code, random_seed=seed, numpy_random_seed=seed,
                    torch_random_seed=seed, fewshot_random_seed=seed,
                )  # fmt: skip
    return [_outcome(task["task"], results, seed) for task in tasks]


def _outcome(task: str, results: Mapping[str, Any], seed: int) -> HarnessOutcome:
    measures = {name: _measures(task, result) for name, result in results.items()}
    beyond = {metric for own in measures.values() for metric, one in own.items() if not one.is_fraction}
    for own in measures.values():  # what is no fraction of one model is none of the others, whose values may all be 0
        own.update({name: replace(one, is_fraction=False) for name, one in own.items() if name in beyond})
    changes = {
        name: compare(measures[BASE], own, seed=seed).changes for name, own in measures.items() if name != BASE and own
    }
    reported = {
        name: {key: float(value) for key, value in result["results"][task].items() if _is_number(value)}
        for name, result in results.items()
    }
    n = len({sample["doc_id"] for sample in results[BASE]["samples"][task]})
    return HarnessOutcome(task, "lm_eval", n, BASE, measures, changes, reported)


def _measures(task: str, result: Mapping[str, Any]) -> dict[str, Measure]:
    """The metrics that lm_eval takes the mean of, or a ratio, example by example; those of the first filter."""
    samples = result["samples"][task]
    first = samples[0]["filter"]
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda sample: int(sample["doc_id"]))
    found: dict[str, Measure] = {}
    for metric in samples[0]["metrics"]:
        values, higher = (
            [sample[metric] for sample in samples],
            bool(result["higher_is_better"][task].get(metric, True)),
        )
        total = result["results"][task].get(f"{metric},{first}")
        if metric == "perplexity" and _is_exp_of_mean(values, total):
            values = [(value, 1.0) for value in values]
        if metric in OF_SUMS and all(isinstance(value, tuple | list) for value in values):
            factor, shape = OF_SUMS[metric]
            sums = np.asarray(values, dtype=np.float64)
            found[metric] = of_ratio(
                Ratio(-sums[:, 0], factor * sums[:, 1], shape), higher_is_better=False, is_fraction=False
            )
        elif all(_is_number(value) for value in values) and _is_number(total):
            numbers = np.asarray(values, dtype=np.float64)
            if math.isclose(float(numbers.mean()), float(total), rel_tol=1e-9, abs_tol=1e-12):  # it is their mean
                is_fraction = bool(((numbers >= 0) & (numbers <= 1)).all())
                found[metric] = mean(numbers, higher_is_better=higher, is_fraction=is_fraction)
    return found


def _is_exp_of_mean(values: Sequence[Any], total: Any) -> bool:
    """Whether lm_eval made a perplexity of sums of log p; a task may have examples that are perplexities already."""
    if not all(_is_number(value) for value in values):
        return all(isinstance(value, float) for value in values)
    try:
        expected = math.exp(-sum(values) / len(values))
    except OverflowError:
        return True
    return _is_number(total) and math.isclose(expected, float(total), rel_tol=1e-9)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) and math.isfinite(value)


def _window(kit: Kit, routes: Sequence[RouteEntry]) -> int | None:
    """Tokens read at once under every route; None: as lm_eval finds them."""
    virtual = 0
    for route in routes:
        with kit.use(route):
            virtual = max(virtual, num_virtual_tokens(kit))
    own = trained_length(kit.base)
    return None if own is None or not virtual else own - virtual


# ---- what a file may do ----------------------------------------------------------------------------------------------


def _check_plain(yaml: Any, file: Path, seen: set[Path]) -> None:
    """ConfigError where a YAML file, or one that it includes, has more than plain values. yaml: lm_eval's reader."""
    if file.resolve() in seen:
        return
    seen.add(file.resolve())
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{file.name} runs Python of its own ({error.problem}): allow it (--allow-code) if you trust it"
        ) from error
    included = config.get("include", ()) if isinstance(config, Mapping) else ()
    for name in included if isinstance(included, list | tuple) else (included,):
        _check_plain(yaml, file.parent / str(name), seen)


def _checked(config: dict[str, Any], file: Path, allow_code: bool) -> dict[str, Any]:
    """The config, with data files that lie beside its file. ConfigError where it is no task, or fetches a metric."""
    if not isinstance(config.get("task"), str):
        raise ConfigError(f"it is no task with a name (task: ...), found {', '.join(map(str, config)) or 'nothing'}")
    if not allow_code:
        import lm_eval.api.metrics  # noqa: F401 - fills the registry
        from lm_eval.api.registry import metric_registry

        known = [str(name) for name in metric_registry]
        for entry in config.get("metric_list") or ():
            name = entry.get("metric") if isinstance(entry, Mapping) else entry
            if name not in known or (isinstance(entry, Mapping) and entry.get("hf_evaluate")):
                raise ConfigError(
                    f"the metric {name!r} is not lm_eval's own; {suggest(str(name), known)} "
                    "(others are code that is fetched: --allow-code)"
                )
        if str(config.get("dataset_path", "")).endswith(".py"):
            raise ConfigError(f"dataset_path={config['dataset_path']} is Python: allow it (--allow-code)")
    options = dict(config.get("dataset_kwargs") or {})
    if "data_files" in options:
        options["data_files"] = _beside(options["data_files"], file.parent)
        config = config | {"dataset_kwargs": options}
    return config


def _try_to_build(config: Mapping[str, Any], allow_code: bool) -> None:
    """ConfigError where lm_eval cannot make its requests of a task: no data, no such split, a template that fails."""
    from lm_eval.tasks import TaskManager

    with _kept_random_states(), _templates(allow_code):
        try:
            (task,) = TaskManager(include_defaults=False).load([dict(config)])["tasks"].values()
            task.set_fewshot_seed(0)
            task.build_all_requests()
            for doc in task.eval_docs:
                task.doc_to_target(doc)
        except Exception as error:  # of lm_eval, of data sets, of templates: they have no class in common
            raise ConfigError(f"lm_eval cannot build its requests: {type(error).__name__}: {error}") from error


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(value, folder) for split, value in files.items()}
    if isinstance(files, list | tuple):
        return [_beside(value, folder) for value in files]
    near = folder / str(files)
    return str(near) if near.exists() and not Path(files).exists() else files


@contextmanager
def _templates(allow_code: bool) -> Iterator[None]:
    """lm_eval renders a task's templates with all of Python in reach: in a sandbox, unless its code may run."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    logger = logging.getLogger("lm_eval")
    level = logger.level
    if not allow_code:
        sandbox = ImmutableSandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=True)
        sandbox.filters |= before.filters
        utils.env = sandbox
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        utils.env = before
        logger.setLevel(level)


@contextmanager
def _kept_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
