"""Hugging Face PEFT's adapter_config.json, read and written without importing peft.

There are three kinds of fields: those that are read, those that do not change the function, and all others, which must
be empty. An unknown field may change the function, so it is an error and not ignored. Checked against peft 0.21.2
(LoraConfig, IA3Config, PromptTuningConfig, PrefixTuningConfig). It knows module paths and numbers; neither tensors nor
kits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from kitout.base.path_patterns import PathPattern
from kitout.errors import Errors, TargetError

PROMPT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING")
_SIZE_KEYS = {"num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads", "num_layers"}
READ = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
    | {"bias", "lora_bias"},
    "IA3": {"feedforward_modules"},
    **dict.fromkeys(PROMPT_TYPES, _SIZE_KEYS),
}
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# What was selected, how it was initialized, where it came from: the tensors of the file hold the rest.
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "init_lora_weights", "init_ia3_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "qalora_group_size", "megatron_core", "init_weights", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "encoder_hidden_size", "prefix_projection",
}  # fmt: skip
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change weights of the base
BIAS_VALUES = ("none", "lora_only", "all")
MAX_PATTERNS = 50  # regular expressions in one file that are more than names
_pattern = lru_cache(maxsize=8192)(PathPattern)
Modules = str | tuple[str, ...]


@dataclass(frozen=True)
class PeftConfig:
    """What the config of a LoRA or IA3 says about the function."""

    kind: str
    """"LORA" or "IA3"."""
    rank: int = 8
    """Where no pattern matches."""
    alpha: float = 8.0
    """Where no pattern matches."""
    rank_pattern: dict[str, int] | None = None
    """Regular expression on a module path -> rank."""
    alpha_pattern: dict[str, float] | None = None
    """Regular expression on a module path -> alpha."""
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the base that are trained: "none", "lora_only" (of the targets) or "all"."""
    lora_bias: bool = False
    """B has a bias."""
    feedforward: Modules = ()
    """IA3: modules whose input is scaled, by regular expression or by name."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that the adapter replaces (heads), by the end of their path."""
    targets: Modules = ()
    """Modules with adapter tensors, by regular expression or by the end of their path."""
    exclude_modules: Modules = ()
    """Modules without, likewise."""
    layers: frozenset[int] | None = None
    """Indices of the blocks; None: all."""
    layers_pattern: tuple[str, ...] = ()
    """Names of the module lists that hold the blocks."""

    def rank_at(self, path: str) -> int:
        return int(_by_pattern(self.rank_pattern, path, self.rank))

    def alpha_at(self, path: str) -> float:
        return float(_by_pattern(self.alpha_pattern, path, self.alpha))

    def at_input(self, path: str) -> bool:
        """IA3: the vector sits on the module's input. PEFT compares plain endings, without a dot."""
        if isinstance(self.feedforward, str):
            return bool(_pattern(self.feedforward).matches(path))
        return any(path.endswith(end) for end in self.feedforward)

    def selects(self, path: str) -> bool:
        """PEFT would give this module an adapter, if it is of a kind that can have one."""
        if not _means(path, self.targets) or _means(path, self.exclude_modules) or _inside(path, self.modules_to_save):
            return False
        if self.layers is None or isinstance(self.targets, str):  # PEFT refuses layers beside a pattern
            return True
        patterns = [rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((m for m in (re.match(p, path) for p in patterns) if m), None)
        return match is not None and int(match[1]) in self.layers


@dataclass(frozen=True)
class PeftPromptConfig:
    """What the config says of a prompt or a prefix. A size is None where the config does not give it."""

    kind: str
    """One of PROMPT_TYPES."""
    task: str
    """One of TASKS."""
    length: int
    """Number of virtual tokens."""
    num_submodules: int
    """Stacks that PEFT counts: 2 for an encoder-decoder."""
    width: int | None
    """Channels of a virtual token, or of the keys of one layer."""
    heads: int | None
    """Of the keys and values."""
    layers: int | None
    """That have keys and values."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that the adapter replaces (heads), by the end of their path."""


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The first pattern that matches the end of the path wins, as in PEFT."""
    return next((v for key, v in (patterns or {}).items() if _pattern(key, at_end=True).matches(path)), default)


def _means(path: str, modules: Modules) -> bool:
    return bool(_pattern(modules).matches(path)) if isinstance(modules, str) else _ends(path, modules)


def _ends(path: str, names: Iterable[str]) -> bool:
    return any(path == n or path.endswith(f".{n}") for n in names)


def _inside(path: str, names: Iterable[str]) -> bool:
    return any(f".{n}." in f".{path}." for n in names)


def read_config(fields: dict[str, Any], errors: Errors) -> PeftConfig | PeftPromptConfig | None:
    """The settings, or None where the type is unknown; every error is added to `errors`."""
    kind = str(fields.get("peft_type"))[:40].rpartition(".")[2]
    if kind not in READ:
        errors.add(f"peft_type is {kind!r}; kitout reads {', '.join(READ)}")
        return None
    for key, value in fields.items():
        if key not in READ[kind] | HARMLESS and value not in (None, False, "", [], {}):
            errors.add(f"{key[:60]}={str(value)[:60]} may change the function and is not supported")
    check = _FieldReader(fields, errors)
    return (_read_prompt_config if kind in PROMPT_TYPES else _read_weight_config)(fields, kind, check, errors)


def _read_prompt_config(fields: dict[str, Any], kind: str, check: _FieldReader, errors: Errors) -> PeftPromptConfig:
    task = str(fields.get("task_type"))[:40].rpartition(".")[2]
    if task not in TASKS:
        errors.add(f"task_type is {task!r}; kitout reads {kind} for {', '.join(TASKS)}")
    sizes = {key: check.size(key) for key in _SIZE_KEYS if fields.get(key) is not None}
    if "num_virtual_tokens" not in sizes:
        errors.add("num_virtual_tokens is missing")
    return PeftPromptConfig(
        kind=kind,
        task=task,
        length=sizes.get("num_virtual_tokens", 1),
        num_submodules=sizes.get("num_transformer_submodules", 2 if task == "SEQ_2_SEQ_LM" else 1),
        width=sizes.get("token_dim"),
        heads=sizes.get("num_attention_heads"),
        layers=sizes.get("num_layers"),
        modules_to_save=check.names("modules_to_save"),
    )


def _read_weight_config(fields: dict[str, Any], kind: str, check: _FieldReader, errors: Errors) -> PeftConfig:
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_BASE):
        errors.add(
            f"init_lora_weights={start[:40]!r} changed the base's weights when training began: save it in PEFT with "
            "path_initial_model_for_weight_conversion=..., which makes it a plain LoRA"
        )
    bias = fields.get("bias", "none")
    if bias not in BIAS_VALUES:
        errors.add(f"bias={str(bias)[:40]!r} is none of {', '.join(BIAS_VALUES)}")
        bias = "none"
    return PeftConfig(
        kind=kind,
        rank=check.number("r", 8, int),
        alpha=check.number("lora_alpha", 8, float),
        rank_pattern=check.patterns("rank_pattern", int),
        alpha_pattern=check.patterns("alpha_pattern", float),
        dropout=check.number("lora_dropout", 0.0, float),
        rslora=check.flag("use_rslora"),
        dora=check.flag("use_dora"),
        bias=bias,
        lora_bias=check.flag("lora_bias"),
        feedforward=check.pattern_or_names("feedforward_modules"),
        modules_to_save=check.names("modules_to_save"),
        targets=check.pattern_or_names("target_modules"),
        exclude_modules=check.pattern_or_names("exclude_modules"),
        layers=check.indices("layers_to_transform"),
        layers_pattern=check.names("layers_pattern"),
    )


class _FieldReader:
    """Reads fields of an expected type; another type adds an error and gives the default."""

    def __init__(self, fields: dict[str, Any], errors: Errors) -> None:
        self.fields, self.errors = fields, errors
        self.num_patterns = 0

    def number(self, key: str, default: Any, kind: type) -> Any:
        return self._number(key, self.fields.get(key, default), default, kind)

    def _number(self, description: str, value: Any, default: Any, kind: type) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) < 2**31 or kind(value) != value:
            what = "a whole number" if kind is int and is_number else "a number"
            self.errors.add(f"{description}={str(value)[:40]!r} is not {what}, or out of range")
            return default
        return kind(value)

    def size(self, key: str) -> int:
        """A whole number, at least 1."""
        value: int = self.number(key, 1, int)
        if value < 1:
            self.errors.add(f"{key}={value} must be at least 1")
        return max(1, value)

    def flag(self, key: str) -> bool:
        value = self.fields.get(key) or False
        if value is not True and value is not False:
            self.errors.add(f"{key}={str(value)[:40]!r} is neither true nor false")
        return value is True

    def names(self, key: str) -> tuple[str, ...]:
        value = self.fields.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.errors.add(f"{key} is not a list of names")
            return ()
        return tuple(value)

    def indices(self, key: str) -> frozenset[int] | None:
        """Whole numbers; None where there are none."""
        value = self.fields.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in values):
            self.errors.add(f"{key}={repr(value)[:40] if values else value} is not a list of indices of blocks")
            return None
        return frozenset(values) or None

    def pattern_or_names(self, key: str) -> Modules:
        value = self.fields.get(key)
        if not isinstance(value, str):
            return self.names(key)
        return value if value and self._is_readable(key, value) else ()

    def patterns(self, key: str, kind: type) -> dict[str, Any]:
        value = self.fields.get(key) or {}
        if not isinstance(value, dict):
            self.errors.add(f"{key} is not an object of patterns and numbers")
            return {}
        return {
            pattern: self._number(f"{key}[{pattern[:60]!r}]", number, 1, kind)
            for pattern, number in value.items()
            if self._is_readable(key, pattern, at_end=True)
        }

    def _is_readable(self, key: str, pattern: str, at_end: bool = False) -> bool:
        try:
            self.num_patterns += _pattern(pattern, at_end=at_end).is_automaton
        except TargetError as error:
            self.errors.add(f"{key}: {error}")
            return False
        if self.num_patterns == MAX_PATTERNS + 1:
            self.errors.add(f"{key}: more than {MAX_PATTERNS} regular expressions in one file")
        return self.num_patterns <= MAX_PATTERNS


def target_modules_for(
    paths: Collection[str], all_paths: Sequence[str], at_input: Collection[str] = ()
) -> dict[str, Any]:
    """target_modules (and feedforward_modules) that select exactly these paths among all module paths of the model.

    Last names where they are enough ("q_proj"), else whole paths, else one regular expression.
    """
    for short in (True, False):
        names = sorted({p.rpartition(".")[2] if short else p for p in paths})
        ends = sorted({p.rpartition(".")[2] if short else p for p in at_input})
        selected = {p for p in all_paths if _ends(p, names)}
        if selected == set(paths) and {p for p in paths if any(p.endswith(e) for e in ends)} == set(at_input):
            return {"target_modules": names, "feedforward_modules": ends}
    either = ["|".join(re.escape(p) for p in sorted(group)) for group in (paths, at_input)]
    return {"target_modules": either[0], "feedforward_modules": either[1] or []}


def patterns_of(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The values that differ from the default, by module path as PEFT's patterns are written.

    A pattern also matches where it ends a longer path, unless it says that the path begins there.
    """
    patterns = {}
    for path, value in values.items():
        if value != default:
            pattern = path if re.fullmatch(r"[\w.]+", path) else re.escape(path)
            patterns["^" + pattern if any(p.endswith(f".{path}") for p in values) else pattern] = value
    return patterns
