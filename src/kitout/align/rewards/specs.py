"""Rewards as a config or a command line writes them: a folder, `module:function`, `gym:NAME`, and weights of several.

Text becomes data here and nothing else: no folder is read, no module imported, no torch loaded (`open_rewards` does
that). All errors of a value come together. A module or gym name is an identifier and is never joined into a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kitout.align.config.gym_name import is_gym, parse_gym
from kitout.errors import ConfigError, Errors

FORMS = "a reward adapter's folder, module:function or gym:NAME"
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FILE = re.compile(r"(?P<path>.+)\.py:(?P<function>[^\W\d]\w*)")


@dataclass(frozen=True)
class RewardSpec:
    """One source of rewards, as written."""

    kind: Literal["adapter", "stage", "function", "gym"]
    """adapter: a folder; stage: an earlier stage of the same file, which trains a reward adapter."""
    text: str
    """As it was written."""
    name: str
    """Its name in logs and files: no path of this machine."""
    weight: float = 1.0
    """What its values are multiplied by in the sum."""

    @property
    def target(self) -> str:
        """The text without `gym:`."""
        return self.text.removeprefix("gym:")


def parse_rewards(value: Any, stages: Collection[str] = ()) -> tuple[RewardSpec, ...]:
    """One text, a list of texts (weight 1 each), or a mapping of texts to weights; in the order written.

    stages: names of earlier stages, which go before folders of the same name. ConfigError names every error.
    """
    errors = Errors(ConfigError, "reward")
    weights = _to_weights(value, errors)
    specs = [
        replace(spec, weight=weight) for text, weight in weights if (spec := _parse(text, stages, errors)) is not None
    ]
    texts = [spec.text for spec in specs]
    for text in dict.fromkeys(text for text in texts if texts.count(text) > 1):
        errors.add(f"{text!r} is there {texts.count(text)} times: name it once, with a weight")
    errors.raise_if_any()
    if not any(spec.weight for spec in specs):
        raise ConfigError("reward: all weights are 0: give one source a weight")
    names = [spec.name for spec in specs]
    return tuple(spec if names.count(spec.name) == 1 else replace(spec, name=spec.text) for spec in specs)


def _to_weights(value: Any, errors: Errors) -> list[tuple[str, float]]:
    if isinstance(value, str):
        return [(value, 1.0)]
    found: list[tuple[str, float]] = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, Sequence):
        pairs = [(text, 1.0) for text in value]
    else:
        errors.add(f"found {type(value).__name__} {value!r}: write {FORMS}, a list of them, or a mapping to weights")
        return found
    if not pairs:
        errors.add(f"it is empty: write {FORMS}")
    for text, weight in pairs:
        if not isinstance(text, str):
            errors.add(f"found {type(text).__name__} {text!r} in it: write {FORMS}")
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            errors.add(f"the weight of {text!r} is {weight!r}, expected a finite number")
        else:
            found.append((text, float(weight)))
    return found


def _parse(text: str, stages: Collection[str], errors: Errors) -> RewardSpec | None:
    if not text.strip() or text != text.strip():
        errors.add(f"{text!r} is empty or has spaces around it: write {FORMS}")
    elif text in stages:
        return RewardSpec("stage", text, text)
    elif is_gym(text):
        try:
            return RewardSpec("gym", text, f"gym:{parse_gym(text).task}")
        except ConfigError as error:
            errors.add(str(error))
    elif file := _FILE.fullmatch(text):
        path = Path(file["path"])
        errors.add(f"{text!r} is a file: write the module's name as Python imports it, {path.name}:{file['function']}")
    elif _FUNCTION.fullmatch(text):
        return RewardSpec("function", text, text)
    elif "::" in text or text.endswith(":") or text.startswith(":"):
        errors.add(f"{text!r} is neither {FORMS}: write as in my_rewards:score")
    else:
        parts = [part for part in Path(text).parts if part not in (".", "..")]
        last = [part for part in parts if part != "adapter"][-1:] or parts[-1:] or [text]
        return RewardSpec("adapter", text, last[0])
    return None
