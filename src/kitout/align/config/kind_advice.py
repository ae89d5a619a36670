"""What to write for a name of another library in a stage of one kind: of the tables, what the kind has.

`rpo_alpha` is `loss.cpo_alpha` in a stage of kind simpo, and nothing in one of kind dpo; there the advice says so. It
knows names of settings, kinds and what is unfit for them, and no values but a config's `kind` of each stage. The
classes whose settings they are it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from kitout.align.config.foreign_keys import ADVICE
from kitout.align.config.kinds import KINDS
from kitout.align.config.unfit_settings import data_noun, unfit_settings
from kitout.train.config.error_messages import AdviceAt, keys_of, sections_of
from kitout.train.config.foreign_keys import ADVICE as OF_RUNS
from kitout.train.config.foreign_keys import fold_key
from kitout.train.config.sections import ConfigSection

AT_STAGE = re.compile(r"stages\.(\d+)\.")
SETTING = re.compile(r"write ([\w.]+)")  # of "write loss.kl_target (and loss.kl_horizon)"
OF_METHODS = "method."  # each method has its own
OF_SAMPLING_ONLY = ("reward", "rollout")
STAGES = "stages"


@dataclass(frozen=True, eq=False)
class KindAdvice:
    """Of the settings of a stage and of what holds the stages."""

    stage: type[ConfigSection]
    """The settings of one stage, whose `loss` is its kind's."""
    whole: type[ConfigSection]
    """Those beside the stages."""

    @cache  # noqa: B019 - there is one
    def of(self, kind: str) -> Mapping[str, str]:
        """Folded key -> what to say of it in a stage of this kind: what stands in its place, or to leave it out."""
        tables: list[Mapping[str, str]] = [ADVICE, OF_RUNS]
        own = {name.rpartition(".")[2] for name in self.settings_of(kind)}
        missing = [name for name in sorted(self._all - self.settings_of(kind)) if "." in name]
        # a right name in the wrong section, or of another kind
        tables.append(
            {fold_key(key): f"write {name}" for name in missing if (key := name.rpartition(".")[2]) not in own}
        )
        found: dict[str, str] = {}
        for key in dict.fromkeys(key for table in tables for key in table):
            advice = [table[key] for table in tables if key in table]
            found[key] = next((one for one in advice if self._fits(one, kind)), None) or self._refusal(advice[0], kind)
        return MappingProxyType(found)

    def within(self, values: Mapping[str, Any]) -> AdviceAt:
        """By the location of a key in these values of a config with stages."""
        stages = values.get(STAGES)
        entries = stages if isinstance(stages, list | tuple) else []
        kinds = [one.get("kind") if isinstance(one, Mapping) else None for one in entries]

        def at(location: str) -> Mapping[str, str]:
            found = AT_STAGE.match(location)
            if found is None:
                return self._of_first(kinds)
            kind = kinds[int(found[1])] if int(found[1]) < len(kinds) else None
            return self.of(kind) if isinstance(kind, str) and kind in KINDS else ADVICE

        return at

    @cache  # noqa: B019 - there is one
    def settings_of(self, kind: str) -> frozenset[str]:
        """Every setting of a stage of this kind by its dotted name, and those that all stages share."""
        entry = KINDS[kind]
        names = [
            name
            for name in _dotted("", self.stage)
            if name.partition(".")[0] != "loss" and (entry.takes_reward or not name.startswith(OF_SAMPLING_ONLY))
        ]
        names += () if entry.loss is None else _dotted("loss.", entry.loss)
        return frozenset(names) - unfit_settings(kind).keys() | self._shared

    @property
    def _shared(self) -> frozenset[str]:
        return frozenset((STAGES, *_dotted("", self.whole)))

    @property
    def _all(self) -> frozenset[str]:
        losses = (name for entry in KINDS.values() if entry.loss is not None for name in _dotted("loss.", entry.loss))
        return frozenset((*_dotted("", self.stage), *losses))

    def _fits(self, advice: str, kind: str) -> bool:
        found = SETTING.match(advice)
        return found is None or found[1].startswith(OF_METHODS) or found[1] in self.settings_of(kind)

    def _refusal(self, advice: str, kind: str) -> str:
        """Of advice that does not fit: what stands in its place in this kind, else why there is nothing to write."""
        setting = advice.removeprefix("write ").partition(" ")[0].partition("=")[0]
        reason = unfit_settings(kind).get(setting)
        if reason is None:
            others = ", ".join(name for name in KINDS if setting in self.settings_of(name))
            return f"leave it out: it is {setting} of {others}, and a stage of kind {kind} has none"
        instead = re.search(r"write \{at\}([\w.]+)", reason)
        if instead is not None:
            return f"write {instead[1]}"
        return f"leave it out: {reason.format(at='', value='', data=data_noun(kind)).split(': leave it out')[0]}"

    def _of_first(self, kinds: list[Any]) -> Mapping[str, str]:
        """For a key beside the stages: that of the first stage that has it, by its number."""
        stages = [(number, kind) for number, kind in enumerate(kinds) if isinstance(kind, str) and kind in KINDS]
        found = dict(self.of(stages[0][1]) if stages else ADVICE)
        for number, kind in reversed(stages):
            for key, advice in self.of(kind).items():
                setting = SETTING.match(advice)
                if setting is not None and setting[1] not in self._shared:
                    found[key] = advice.replace("write ", f"write {STAGES}.{number}.", 1)
        return found


def _dotted(prefix: str, section: type[ConfigSection]) -> Iterator[str]:
    """Its settings and those of the sections in it, but for those of stages."""
    inner = {name: one for of_entries in (False, True) for name, one in sections_of(section, of_entries)}
    for key in keys_of(section):
        yield f"{prefix}{key}"
        one = inner.get(key)
        if one is not None and issubclass(one, ConfigSection) and key != STAGES:
            yield from _dotted(f"{prefix}{key}.", one)
