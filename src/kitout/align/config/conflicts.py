"""What stages say of each other and cannot mean: reported before a model is loaded, all at once, each with its line.

`find_conflicts` and `find_remarks` need the config alone, `method_conflicts` its methods too. What needs the model, the
data or a folder is for later: `find_inputs` and the pre-flight.
"""

from __future__ import annotations

from collections.abc import Iterator

from kitout.align.config.gym_name import is_gym, parse_gym
from kitout.align.config.kinds import KINDS
from kitout.align.config.losses import PPOLoss
from kitout.align.config.schema import AlignConfig, RewardSource, StageConfig
from kitout.align.config.unfit_settings import data_noun, unfit_settings
from kitout.data.examples.format_table import FORMATS
from kitout.errors import ConfigError
from kitout.train.config.method_field import method_to_dict

SOURCES = "a stage of kind reward before it, its folder, module:function or gym:NAME"
# Adapters beside the one that is trained. The first is what a stage starts from, which it is compared with at the end
# whether its loss has a reference or not.
REFERENCE, VALUE = "reference", "value"
SAMPLING = ", ".join(name for name, kind in KINDS.items() if kind.takes_reward)


def find_conflicts(config: AlignConfig) -> Iterator[str]:
    """What can be found out without the methods."""
    yield from _name_conflicts(config)
    for number, stage in enumerate(config.stages):
        at = f"stages.{number}."
        yield from _from_conflicts(config, number, at)
        yield from _reward_conflicts(config, number, at)
        yield from _loss_conflicts(stage, at)
        yield from _data_conflicts(stage, at)
        yield from _seed_conflicts(config, number, at)
        yield from _unfit_conflicts(stage, at)


def method_conflicts(config: AlignConfig) -> Iterator[str]:
    """What the methods of stages make impossible."""
    values = {one.source for stage in config.stages if stage.of_kind.has_value for one in stage.reward}
    reported: set[int] = set()  # stages whose method has dropout, which others may share
    for number, stage in enumerate(config.stages):
        method, owner = config.method_of(stage), config.method_owner(stage)
        before = config.stage(stage.from_) if stage.from_ is not None else None
        parent = None if before is None else config.method_of(before)
        if before is not None and stage.method is not None and parent is not None and stage.method != parent:
            yield (
                f"stages.{number}.method={method_to_dict(stage.method)}: it starts from {before.name}, whose method is "
                f"{method_to_dict(parent)}: leave it out"
            )
        dropout = 0.0 if method is None else method.model_dump().get("dropout", 0.0)
        is_scorer = stage.of_kind.takes_reward or stage.name in values
        if owner is None or not (dropout and is_scorer) or (at := config.stages.index(owner)) in reported:
            continue
        reported.add(at)
        reason = (
            "a policy that has not changed gives an answer another probability each time"
            if stage.of_kind.takes_reward
            else f"the value adapter of ppo starts from {stage.name}, and has another score each time"
        )
        yield f"stages.{at}.method.dropout={dropout:g}: with dropout {reason}: write stages.{at}.method.dropout=0"


def find_remarks(config: AlignConfig) -> Iterator[str]:
    """What is allowed and may not be meant."""
    for number, stage in enumerate(config.stages):
        at = f"stages.{number}." if len(config.stages) > 1 else ""
        if stage.of_kind.reference == "by beta" and not stage.has_reference:
            yield f"{at}loss.beta=0: the reference is off, no KL is computed"
        if stage.rollout is not None and (stage.rollout.top_k or stage.rollout.top_p < 1):
            yield (
                f"{at}rollout: answers are sampled from a part of the distribution that is trained, which biases their "
                "ratios: top_p=1 and top_k=0 sample from all of it"
            )


def _name_conflicts(config: AlignConfig) -> Iterator[str]:
    names = [stage.name for stage in config.stages]
    for number, name in enumerate(names):
        if name in names[:number]:
            free = next(f"{name}-{i}" for i in range(2, len(names) + 2) if f"{name}-{i}" not in names)
            yield f"stages.{number}.name={name}: a stage before it has that name: write stages.{number}.name={free}"
    for number, stage in enumerate(config.stages):
        own = [REFERENCE] if stage.of_kind.writes_text and stage.loss is not None and stage.from_ else []
        own += [VALUE] if stage.of_kind.has_value else []
        own += [f"reward-{i}" for i in range(len(stage.reward))]
        if stage.name in own:
            yield (
                f"stages.{number}.name={stage.name}: the stage itself has another adapter of that name beside the one "
                f"that it trains: write stages.{number}.name={stage.kind}-{stage.name}"
            )


def _from_conflicts(config: AlignConfig, number: int, at: str) -> Iterator[str]:
    stage = config.stages[number]
    if stage.from_ is None:
        return
    heading = f"{at}from={stage.from_}"
    if misplaced := _misplaced(config, number, stage.from_):
        yield f"{heading}: {misplaced}"
    before = _before(config, number, stage.from_)
    if before is not None and stage.of_kind.writes_text and not before.of_kind.writes_text:
        hint = f"write {at}from={before.from_}" if before.from_ else "leave it out"
        yield f"{heading}: a reward adapter has a scalar head and writes no text, {stage.kind} trains answers: {hint}"


def _reward_conflicts(config: AlignConfig, number: int, at: str) -> Iterator[str]:
    stage = config.stages[number]
    if not stage.of_kind.takes_reward:
        if stage.reward:
            yield f"{at}reward: a stage of kind {stage.kind} takes none ({SAMPLING} do): leave it out"
        return
    if not stage.reward:
        known = [one.name for one in config.stages[:number] if not one.of_kind.writes_text]
        own = [one.path for one in stage.data.train if is_gym(one.path)]
        hint = f": write {at}reward={[*known, *own][0]}" if known or own else f": {SOURCES}"
        yield f"{at}reward: a {stage.kind} stage needs what scores its answers{hint}"
    seen: set[str] = set()
    for one in stage.reward:
        yield from (f"{at}reward={one.source}: {text}" for text in _source_errors(config, number, one))
        if one.source in seen:
            yield f"{at}reward={one.source}: is there twice: write one with the sum of both weights"
        seen.add(one.source)
    yield from (f"{at}{error}" for error in _task_conflicts(stage))


def _task_conflicts(stage: StageConfig) -> Iterator[str]:
    """A task of reasoning-gym judges all entries of that task, of any settings, and none of another."""
    data, rewards = ([text for text in texts if is_gym(text) and not [*_gym_errors(text)]] for texts in (
        [source.path for source in stage.data.train], [one.source for one in stage.reward]
    ))  # fmt: skip
    by_task: dict[str, str] = {}
    for text in rewards:
        first = by_task.setdefault(parse_gym(text).task, text)
        if parse_gym(first) != parse_gym(text):
            yield f"reward={text}: {first} judges all answers to questions of that task already: leave one of both out"
    unjudged = {parse_gym(text).task: text for text in reversed(data) if parse_gym(text).task not in by_task}
    if unjudged and any(parse_gym(text).task in by_task for text in data):
        sources = ", ".join([*(one.source for one in stage.reward), *reversed(unjudged.values())])
        yield f"reward: it has no source for the questions of {', '.join(unjudged)}: write reward=[{sources}]"


def _seed_conflicts(config: AlignConfig, number: int, at: str) -> Iterator[str]:
    stage = config.stages[number]
    takers = [one.name for one in config.stages if stage.name in (one.from_, *(each.source for each in one.reward))]
    if stage.train.seeds and takers:
        yield (
            f"{at}train.seeds: {takers[0]} takes one adapter of {stage.name}, and seeds make several: write "
            f"{at}train.seed, and run the file once more with another output.folder for each seed"
        )


def _source_errors(config: AlignConfig, number: int, one: RewardSource) -> Iterator[str]:
    stage = config.stages[number]
    if one.weight == 0:
        yield "a weight of 0 counts nothing: leave it out, or write another weight"
    if one.of == "gym":
        gyms = [source.path for source in stage.data.train if is_gym(source.path)]
        errors = list(_gym_errors(one.source))
        yield from errors
        known = [parse_gym(gym) for gym in gyms if not [*_gym_errors(gym)]]
        if known and not errors and parse_gym(one.source) not in known:
            yield f"it scores answers to its own questions, and the data is {', '.join(gyms)}: write reward={gyms[0]}"
    if one.of != "adapter":
        return
    if misplaced := _misplaced(config, number, one.source):
        yield misplaced
    before = _before(config, number, one.source)
    if before is not None and before.of_kind.writes_text:
        yield f"is a stage of kind {before.kind}, whose adapter scores nothing: name {SOURCES}"


def _gym_errors(text: str) -> Iterator[str]:
    try:
        parse_gym(text)
    except ConfigError as error:
        yield str(error)


def _misplaced(config: AlignConfig, number: int, name: str) -> str:
    """Why a stage cannot take what this one has not yet; "" if it can, or if the name is no stage's."""
    stage = config.stages[number]
    if name == stage.name:
        known = [one.name for one in config.stages[:number]]
        return f"a stage cannot take what it trains itself: name a stage before it ({', '.join(known) or 'none'})"
    other = next((one for one in config.stages[number + 1 :] if one.name == name), None)
    if other is None or _before(config, number, name) is not None:
        return ""
    if stage.name in _taken(config, other):
        return f"{name} needs {stage.name} itself: a circle; leave one of the two out"
    return f"{name} is trained after {stage.name}: write its stage before this one"


def _before(config: AlignConfig, number: int, name: str) -> StageConfig | None:
    return next((one for one in config.stages[:number] if one.name == name), None)


def _taken(config: AlignConfig, stage: StageConfig) -> set[str]:
    """The names of all stages that one needs, through others too."""
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        one = waiting.pop()
        names = {one.from_ or "", *(source.source for source in one.reward)} - found
        found |= names
        waiting += [other for other in config.stages if other.name in names]
    return found


def _loss_conflicts(stage: StageConfig, at: str) -> Iterator[str]:
    rollout, loss = stage.rollout, stage.loss
    if rollout is None:
        return
    kind = stage.of_kind
    if rollout.samples < kind.min_samples:
        yield (
            f"{at}rollout.samples={rollout.samples}: {stage.kind} compares the answers to one prompt with each other, "
            f"and one alone teaches nothing: write {at}rollout.samples={kind.samples}"
        )
    if isinstance(loss, PPOLoss):
        answers = rollout.prompts * rollout.samples
        if answers % loss.minibatches:
            near = max(n for n in range(1, loss.minibatches) if answers % n == 0)
            yield (
                f"{at}loss.minibatches={loss.minibatches} does not divide the {answers} answers of a step "
                f"(rollout.prompts={rollout.prompts} x rollout.samples={rollout.samples}): write "
                f"{at}loss.minibatches={near}"
            )
        if loss.kl_target is not None and loss.beta == 0:
            yield (
                f"{at}loss.kl_target={loss.kl_target:g} steers loss.beta by factors, and beta=0 turns the reference "
                f"off: write {at}loss.beta=0.05, or leave kl_target out"
            )


def _data_conflicts(stage: StageConfig, at: str) -> Iterator[str]:
    wanted = stage.of_kind.data_format
    for number, one in enumerate(stage.data.train):
        fitting = [name for name, each in FORMATS.items() if each.kind in stage.of_kind.reads]
        if wanted != "auto" and one.format not in ("auto", *fitting):
            yield (
                f"{at}data.train.{number}.format={one.format}: a {stage.kind} stage reads the format "
                f"{' or '.join(fitting)}: leave it out"
            )
        if is_gym(one.path):
            yield from (f"{at}data.train.{number}.path: {error}" for error in _gym_errors(one.path))
        if is_gym(one.path) and wanted not in ("auto", "prompts"):
            yield (
                f"{at}data.train.{number}.path={one.path}: it has questions and no answers to compare: a {stage.kind} "
                f"stage reads the format {wanted}"
            )

    for name in ("validation", "test"):
        value = getattr(stage.data, name)
        if isinstance(value, str) and is_gym(value):
            yield (
                f"{at}data.{name}={value}: what is held out is split off the prompts of data.train: write a number, "
                f"{at}data.{name}=200"
            )


def _unfit_conflicts(stage: StageConfig, at: str) -> Iterator[str]:
    """What a stage sets and its kind has not. at: what its settings' names begin with."""
    for setting, reason in unfit_settings(stage.kind).items():
        section_name, name = setting.split(".")
        section = getattr(stage, section_name)
        field = "from_" if name == "from" else name
        value = getattr(section, field)
        if value != type(section).model_fields[field].get_default(call_default_factory=True):
            yield f"{at}{setting}: {reason.format(at=at, value=value, data=data_noun(stage.kind))}"
