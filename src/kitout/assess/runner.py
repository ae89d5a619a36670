"""`kitout.assess.run`: base and adapters on the same sets of examples, in one run.

Everything that is asked for is checked and read first, and all faults are reported together; then each set is asked of
the base (once, its answers are kept) and of every adapter. Weights, modes and random state are left as they were. It
knows sets and scores, and nothing of folders and screens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import GenerationMixin

from kitout.assess.assessment import Assessment
from kitout.assess.cost import measure_cost
from kitout.assess.harness import measure_tasks, read_tasks
from kitout.assess.read_set import SetReader
from kitout.assess.spectrum import measure_spectrum
from kitout.base.eval_mode import eval_mode
from kitout.data.encode.template_date import fix_template_date
from kitout.errors import ConfigError, Errors, KitoutError, RouteError, UnknownAdapter, suggest
from kitout.evaluate.compare import BASE
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet
from kitout.evaluate.sets.outcome import SetProgressFn, forgetting_of, measure_set
from kitout.evaluate.sets.suites import check_suite, suite_sets
from kitout.files.usage_record import UsageRecord
from kitout.kit import Kit
from kitout.route import Route, RouteEntry, adapter_names, check_entry, normalize_route
from kitout.train.config.error_messages import explain
from kitout.train.config.schema import ModelConfig, SourceConfig
from kitout.train.objectives.tasks import TASKS
from kitout.train.setup.base_model import choose_pad_token, load_tokenizer
from kitout.train.setup.find_inputs import resolve_model

LogFn = Callable[[str], None]


def run(
    kit: Kit,
    adapters: Sequence[str] | Mapping[str, Route] | None = None,
    sources: Sequence[str | Mapping[str, Any] | SourceConfig] = (),
    *,
    suite: str = "none",
    cost: bool = False,
    spectrum: bool = False,
    harness: Sequence[str | Path] = (),
    allow_code: bool = False,
    group: str | None = None,
    folders: Mapping[str, str | Path] | None = None,
    tokenizer: Any = None,
    pixels: Any = None,
    usages: Mapping[str, UsageRecord] | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    keep_base: bool = True,
    keep_in: str | Path | None = None,
    log: LogFn = lambda _line: None,
    on_progress: SetProgressFn | None = None,
) -> Assessment:
    """Base and adapters on every source and on a suite of forgetting.

    adapters: names, all of the kit's by default; or name -> route, {"both": Stack("a", "b")}. sources: as `data.train`
    of a run takes them, a path alone or path with format, columns, limit; rows with question, choices and answer are
    scored by the likelihood of each choice, plain texts by bits per byte, all else as in training. suite: none, quick
    or full. cost: time what each costs; folders: by adapter the folder that it was loaded from (a Predictor's
    `folders`), for its files and what its training took. spectrum: count intruder dimensions (`assess.spectrum`).
    harness: YAML files of tasks of lm-evaluation-harness. allow_code: they may run Python of their own. group: a
    column, of sources of rows; rows with the same value there (questions about one text) are resampled as a whole; a
    source's own `group` goes first. tokenizer, pixels (a PixelProcessor): of a base that does not say where its own is.
    usages: how adapters are used that do not say it themselves, by name, "" for the base (those of a Predictor). seed:
    of samples and intervals. keep_base: False asks the base anew and keeps nothing. keep_in: a folder for the answers
    of each adapter to each set, written as soon as they are known; the same call takes them from there. log: gets a
    line about each set. on_progress: (set, examples done, examples in all).
    Raises UnknownAdapter, or ConfigError with every fault of sources and suite.
    """
    kit.state.check_attached()
    if kit.merged:
        raise ConfigError(f"{', '.join(kit.merged)} merged into the base: kit.unmerge() before measuring against it")
    routes = _routes(kit, adapters)
    stated = _usages(kit, routes)
    usage = _usage(routes, stated, usages or {})
    if usage is not None and usage.task not in TASKS:
        raise ConfigError(
            f"{', '.join(routes)}: a reward adapter scores answers and writes none: kitout predict ADAPTER PAIRS gives "
            "its accuracy on pairs with the interval, kitout align ppo --reward ADAPTER trains a policy with it"
        )
    reads_images = TASKS[usage.task].reads_images if usage is not None else kit.base.main_input_name == "pixel_values"
    own_tokenizer = None if reads_images else tokenizer or _own_tokenizer(kit, usage)
    if reads_images and pixels is None:
        pixels = _own_pixels(kit, usage)
    pad_token_id = None if own_tokenizer is None else choose_pad_token(kit.config, own_tokenizer)
    asked = Asked(kit, own_tokenizer, pad_token_id, max_new_tokens)
    reader = SetReader(kit, own_tokenizer, usage, _writes_text(kit, usage), stated, pixels, seed)
    errors = Errors(ConfigError, "what to measure on")
    if spectrum and not routes:
        errors.add("spectrum counts the intruder dimensions of adapters, and there is none: leave it out, or name one")
    tasks: list[dict[str, Any]] = []
    if harness and not reader.writes_text:
        errors.add("harness asks a language model, and this model answers with labels")
    elif harness:
        log("building the requests of lm_eval ...")
        try:
            tasks = read_tasks(harness, allow_code)
        except ConfigError as error:
            errors.add(str(error))
    sets, forgotten = _read_all(reader, sources, group, suite, bool(spectrum or cost or harness), errors, log)
    folder = None if keep_in is None else Path(keep_in)
    before = kit.active
    outcomes = []
    try:
        with eval_mode(kit.base, kit):
            for what in (*sets, *forgotten):
                log(f"measuring {what.name} ({what.kind}, {len(what):,} examples) ...")
                outcomes.append(measure_set(asked, what, routes, seed, keep_base, on_progress, folder, log))
            if cost:
                log("measuring the cost ...")
            costs = measure_cost(kit, routes, {k: Path(v) for k, v in (folders or {}).items()}) if cost else {}
            spectra = measure_spectrum(kit, routes, log) if spectrum else {}
            of_harness = measure_tasks(kit, own_tokenizer, tasks, routes, seed, allow_code, log)
    finally:
        kit.use(before)
    of_sources, of_suite = tuple(outcomes[: len(sets)]), tuple(outcomes[len(sets) :])
    forgetting = {name: forgetting_of(list(of_suite), name) for name in routes} if of_suite else {}
    return Assessment(of_sources, suite, of_suite, forgetting, costs, spectra, tuple(of_harness))


def _routes(kit: Kit, adapters: Sequence[str] | Mapping[str, Route] | None) -> dict[str, RouteEntry]:
    if isinstance(adapters, str):
        raise ConfigError(f"adapters is a list of names, found {adapters!r}: write [{adapters!r}]")
    names = list(kit.names) if adapters is None else adapters
    given: dict[str, Route] = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    errors, routes = Errors(UnknownAdapter, "assess"), {}
    for name, route in given.items():
        try:
            routes[name] = check_entry(normalize_route(route))
        except RouteError as error:
            errors.add(f"{name}: {error}")
            continue
        if name == BASE:
            errors.add(f"{BASE!r} is what adapters are compared with: call {route!r} something else")
        for each in adapter_names(route):
            if each not in kit.state:
                errors.add(f"no adapter is called {each!r}: {suggest(str(each), kit.names)}")
    errors.raise_if_any()
    return routes


def _usages(kit: Kit, routes: Mapping[str, RouteEntry]) -> dict[str, UsageRecord]:
    """How each adapter was trained that says so itself."""
    names = dict.fromkeys(each for route in routes.values() for each in adapter_names(route))
    return {name: UsageRecord.model_validate(own) for name in names if (own := kit[name].usage) is not None}


def _usage(
    routes: Mapping[str, RouteEntry], stated: Mapping[str, UsageRecord], others: Mapping[str, UsageRecord]
) -> UsageRecord | None:
    """How the adapters were trained, as the first one says; ConfigError where another has other answers."""
    names = dict.fromkeys(each for route in routes.values() for each in adapter_names(route))
    if not stated:
        return next((others[name] for name in [*names, ""] if name in others), None)
    first, *_ = stated
    errors = Errors(ConfigError, f"measured together with {first!r}")
    for name, one in stated.items():
        if one.task != stated[first].task:
            errors.add(f"{name!r} is for {one.task}, {first!r} for {stated[first].task}: assess them apart")
        elif one.labels != stated[first].labels:
            errors.add(f"{name!r} and {first!r} have other labels: assess them apart")
    errors.raise_if_any()
    return stated[first]


def _writes_text(kit: Kit, usage: UsageRecord | None) -> bool:
    if usage is not None:
        return TASKS[usage.task].generates_text
    return isinstance(kit.base, GenerationMixin) and bool(kit.base.can_generate())


def _own_name(kit: Kit, what: str) -> str:
    name = str(getattr(kit.config, "_name_or_path", "") or "")
    if not name:
        raise ConfigError(f"the base does not say where its {what} is: give {what}=...")
    return name


def _own_tokenizer(kit: Kit, usage: UsageRecord | None) -> Any:
    """With the chat template as training had it, where that prints the day."""
    tokenizer = load_tokenizer(ModelConfig(name=_own_name(kit, "tokenizer")))
    if usage is not None and usage.text is not None and usage.text.template_date is not None:
        fix_template_date(tokenizer, usage.text.template_date)
    return tokenizer


def _own_pixels(kit: Kit, usage: UsageRecord | None) -> Any:
    from kitout.data.images.pixels import PixelProcessor  # images need pillow

    record = None if usage is None else usage.images
    options: dict[str, Any] = {} if record is None else {"size": record.size, "settings": record.processor}
    return PixelProcessor.from_pretrained(resolve_model(_own_name(kit, "pixels")), **options)


def _read_all(
    reader: SetReader,
    sources: Sequence[Any],
    group: str | None,
    suite: str,
    has_more: bool,
    errors: Errors,
    log: LogFn,
) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
    sets: list[EvaluationSet] = []
    read: list[Any] = []
    for source in sources:
        if source in read:
            log(f"{source} is given twice, and measured once")
            continue
        read.append(source)
        given = dict(source) if isinstance(source, Mapping) else {"path": str(source)}
        path = source.path if isinstance(source, SourceConfig) else given.get("path", given)
        try:
            own_group = given.pop("group", group)
            config = source if isinstance(source, SourceConfig) else SourceConfig.model_validate(given)
            sets.append(reader.read(config, own_group))
        except ValidationError as error:
            errors.add(f"{path}: {'; '.join(explain(error, SourceConfig))}")
        except (KitoutError, ValueError, OSError) as error:
            errors.add(f"{path}: {error}")
    forgotten: list[EvaluationSet] = []
    try:
        check_suite(suite)
        if suite != "none" and (not reader.writes_text or reader.kit.config.is_encoder_decoder):
            raise ConfigError(f"suite={suite!r} asks a decoder that writes text, and this is none: write suite='none'")
        if not errors.messages:
            forgotten += suite_sets(suite, reader.tokenizer, reader.seed, log)
    except KitoutError as error:
        errors.add(str(error))
    if not (sources or has_more) and suite == "none" and not errors.messages:
        errors.add("nothing is given: name a source, or a suite (quick)")
    errors.raise_if_any()
    return sets, forgotten
