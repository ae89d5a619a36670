"""The space of designs: methods, the values that their settings may have, and multiples of the learning rate.

`{method: [LoRA, IA3], LoRA: {rank: [2, 4, 8]}, lr: {multipliers: [0.3, 3.0]}}`. Every value is tried on its method when
the plan is read, so a space holds nothing that cannot be built. It knows methods by their names and settings, no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kitout.errors import suggest
from kitout.format import short_repr
from kitout.train.config.error_messages import JOIN
from kitout.train.config.method_field import fold_name, names_a_method, parse_method
from kitout.train.config.schema import WITHOUT_METHODS
from kitout.train.config.sections import ConfigSection

if TYPE_CHECKING:
    from kitout.method import Method

RANGE_KEYS = {"low", "high", "log"}


class LearningRates(ConfigSection):
    """Multiples of a method's own learning rate."""

    multipliers: tuple[float, ...] = (0.3, 3.0)
    """The lowest and the highest, between which a candidate's is log-uniform; one number: that one for all."""

    @field_validator("multipliers", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @field_validator("multipliers")
    @classmethod
    def _check_ends(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not 1 <= len(value) <= 2 or not all(0 < one <= 1000 for one in value) or list(value) != sorted(value):
            raise ValueError(f"expected one or two numbers above 0, the lower first; found {short_repr(list(value))}")
        return value

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest."""
        return self.multipliers[0], self.multipliers[-1]


@dataclass(frozen=True)
class Choices:
    """The values that one setting may have."""

    values: tuple[Any, ...]
    """All of them; of a range its two ends."""
    is_range: bool = False
    """Everything between the ends."""
    is_log: bool = False
    """Of a range: log-uniform."""

    @property
    def is_whole(self) -> bool:
        """Of a range: whole numbers."""
        return all(isinstance(value, int) for value in self.values)

    @property
    def by_text(self) -> dict[str, Any]:
        """Each value by its JSON."""
        return {json.dumps(value): value for value in self.values}


class SpaceConfig(ConfigSection):
    """Methods and, under the name of each, what its settings may be."""

    method: tuple[str, ...] = Field(min_length=1)
    """Names as `kitout methods` has them."""
    lr: LearningRates = LearningRates()
    """Of every candidate, as multiples of its method's own."""
    settings: dict[str, Any] = {}
    """By method: each setting's values as a list, or {low, high, log} of a number. Written under the method's name."""

    @model_validator(mode="before")
    @classmethod
    def _collect_settings(cls, value: Any) -> Any:
        """What stands under the names of methods."""
        if not isinstance(value, Mapping):
            return value
        known = cls.model_fields.keys()
        of_methods = {str(name): one for name, one in value.items() if name not in known}
        return {name: one for name, one in value.items() if name in known} | (
            {"settings": of_methods} if of_methods else {}
        )

    @field_validator("method", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_space(self, info: ValidationInfo) -> SpaceConfig:
        errors = list(self._value_errors())
        if info.context is not WITHOUT_METHODS:
            errors += self._method_errors()
        if errors:
            raise ValueError(JOIN.join(dict.fromkeys(errors)))
        return self

    def _value_errors(self) -> Iterator[str]:
        """Settings of what `method` does not name, and values that are neither a list nor a range."""
        named = {fold_name(name) for name in self.method}
        for name, settings in self.settings.items():
            if fold_name(name) not in named:
                hint = "add it to method, or leave it out" if names_a_method(name) else "it is no method and no setting"
                yield f"{name[:80]}: space.method does not name it ({', '.join(self.method)}): {hint}"
            elif not isinstance(settings, Mapping):
                yield f"{name}: expected settings with their values ({{rank: [2, 4]}}), found {short_repr(settings)}"
            else:
                for setting, values in settings.items():
                    if problem := _problem_with(values):
                        yield f"{name}.{setting}: {problem}"

    def _method_errors(self) -> Iterator[str]:
        """Methods that cannot be built, and values that their settings do not take."""
        if len({fold_name(name) for name in self.method}) < len(self.method):
            yield f"method: expected each method once; found {', '.join(self.method)}"
        for name in self.method:
            try:
                fields = type(parse_method(name)).model_fields
            except ValueError as error:
                yield f"method: {error}"
                continue
            for setting, choices in self.choices_of(name).items():
                if setting not in fields:
                    yield f"{name}.{setting}: {name} has no such setting; {suggest(setting, fields)}"
                    continue
                for value in choices.values:
                    try:
                        parse_method({"name": name, setting: value})
                    except ValueError as error:
                        yield f"{name}.{setting}: {error}"

    def choices_of(self, name: str) -> dict[str, Choices]:
        """By setting of this method; {} where only its learning rate varies."""
        own: Any = next((one for key, one in self.settings.items() if fold_name(key) == fold_name(name)), {})
        values_of = own if isinstance(own, Mapping) else {}
        return {str(key): _as_choices(values) for key, values in values_of.items() if not _problem_with(values)}

    def build(self, name: str, settings: Mapping[str, Any]) -> Method:
        """A method with these settings. ValueError where it does not take them together."""
        return parse_method({"name": name, **settings})

    def num_designs(self) -> float:
        """How many there are besides their learning rates; inf with a range of fractions."""
        total = 0.0
        for name in self.method:
            sizes = [_size_of(choices) for choices in self.choices_of(name).values()]
            total += math.prod(sizes)
        return total

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        plain = self.model_dump(mode="json", exclude={"settings"})
        return {**plain, **self.settings}


def _problem_with(values: Any) -> str:
    if isinstance(values, list | tuple):
        return "" if values else "expected at least one value, found none"
    if not isinstance(values, Mapping):
        return f"expected a list of values, or {{low: 2, high: 64, log: true}}; found {short_repr(values)}"
    low, high, log = values.get("low"), values.get("high"), values.get("log", False)
    are_numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not values.keys() <= RANGE_KEYS or not isinstance(log, bool) or not are_numbers:
        return f"a range has the numbers low and high, and log: true or false; found {short_repr(dict(values))}"
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if not low < high or (log and low <= 0):
        return f"expected low below high{', and above 0 with log' if log else ''}; found {low:g} and {high:g}"
    return ""


def _as_choices(values: Any) -> Choices:
    if isinstance(values, Mapping):
        return Choices((values["low"], values["high"]), True, bool(values.get("log", False)))
    return Choices(tuple(values))


def _size_of(choices: Choices) -> float:
    if not choices.is_range:
        return len(choices.by_text)
    low, high = choices.values
    return high - low + 1 if choices.is_whole else math.inf
