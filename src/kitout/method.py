"""The Method: a frozen config that says where an adapter sits and builds its Deltas: all that a new method defines.

`register` makes it known to files, the command line and the law suite. It knows sites and Deltas, and nothing of kits,
routes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta, KeyValue
from kitout.errors import ConfigError, Errors
from kitout.format import short_repr
from kitout.no_booleans import refuse_booleans
from kitout.route import Route

MAX_LISTED = 8  # targets, or ranks by pattern, that a table shows one by one


@dataclass(frozen=True)
class TrainingDefaults:
    """How AdamW trains a method by default, with a short linear warmup and a decay of the learning rate to zero."""

    lr: float = 1e-3
    """Peak learning rate of the adapter's parameters."""
    weight_decay: float = 0.0
    """Of its matrices. Vectors, prompts and prefixes never decay (`kitout.train.loop.optimizer`)."""
    head_lr: float = 3e-3
    """Peak learning rate of a newly initialized head that belongs to the adapter."""
    min_steps: int = 100
    """Optimizer steps that it needs at least: epochs are chosen by them where a run names neither epochs nor steps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteStart:
    """What data say about one site, for initial values that follow from them; on CPU."""

    directions: Tensor | None = None
    """[n, d_in]: leading right singular vectors of the site's inputs, orthonormal; None: not collected."""
    gradient: tuple[Tensor, Tensor, Tensor] | None = None
    """U [d_out, n], s [n], V [n, d_in]: the leading part of the weight's gradient; None: not collected."""


class Method(BaseModel):
    """A frozen, keyword-only, validated config: where an adapter sits and what its Deltas are.

    targets: the selection language of `kitout.base.select`, a text or a list of its words; None = the method's own
    default. layers: "all", "last:4", "0,3,5", "decoder/last:4".
    """  # `kitout methods` shows what a class docstring says of each setting

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)

    mergeable: ClassVar[bool] = True
    """Some weights of the base compute the same function."""
    starts_as_identity: ClassVar[bool] = True
    """A new adapter leaves the outputs bit-identical (law 2)."""
    trains_in_eval_mode: ClassVar[bool] = False
    """The base is in eval mode while it trains: no dropout, no drop-path."""
    training: ClassVar[TrainingDefaults] = TrainingDefaults()
    """With default settings. Where there is a config, call `training_defaults`."""
    default_targets: ClassVar[str] = "all-linear"
    """What `targets` selects when it is None."""
    default_location: ClassVar[str] = ""
    """For people: where it sits by default. Empty where `default_targets` says it."""
    limitations: ClassVar[str] = ""
    """For people: what it does not support with rows, in a Mix or at other strengths."""
    parts_may_have_tokens: ClassVar[bool] = True
    """The adapters that it composes may have virtual tokens."""

    targets: str | None = None
    layers: str = "all"

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        refuse_booleans(cls.model_fields[info.field_name or ""].annotation, value)
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _join_words(cls, targets: object) -> object:
        """A list of words, as PEFT's target_modules may be, is one selection."""
        if isinstance(targets, (list, tuple)) and targets and all(isinstance(word, str) for word in targets):
            return " ".join(targets)
        return targets

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            errors = Errors(ConfigError, type(self).__name__)
            for e in error.errors():
                setting = ".".join(map(str, e["loc"]))
                message = e["msg"].removeprefix("Value error, ")
                errors.add(f"{setting}={short_repr(e['input'])}: {message}" if setting else message)
            errors.raise_if_any()

    def selection(self) -> str:
        """The words that select its sites: `targets`, or what stands for it where that is None."""
        return self.targets or self.default_targets

    def sites(self, survey: Survey) -> list[Site]:
        """The selected sites, in model order. Default: `targets` and `layers` through the selection language."""
        return select(survey.sites, self.selection(), self.layers)

    def part_names(self) -> tuple[str, ...]:
        """The adapters that it composes, by their names on the kit; () for all but compositions."""
        return ()

    def fixed_route(self) -> Route:
        """The route that the adapter stands for; None for all but a route under a name."""
        return None

    def sites_over_parts(self, survey: Survey, parts: Mapping[str, Sequence[Site]]) -> list[Site]:
        """A composition's sites (port "parts"), given those of its parts by their names; instead of `sites`."""
        return []

    def why_not_at_weight(self, site: Site) -> str:
        """Why this method cannot act at the port "weight"; "" where folding its Delta into what is read is exact.

        No value passes at such a site: the weight and the bias are read by another module, and `Delta.fold` changes
        them while that module runs.
        """
        return f"{type(self).__name__} acts on values"

    def build_shared(self, sites: Sequence[Site]) -> nn.Module | None:
        """One module per adapter that every Delta may use (a prefix encoder); None for most."""
        return None

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        """The new Delta of one site. When values come from a file, site.module has shapes and no values (meta)."""
        raise NotImplementedError

    def init_from_forward(
        self, deltas: Mapping[Site, Delta], key_values: Callable[[Tensor], Mapping[str, KeyValue]]
    ) -> None:
        """Initial values that need a forward of the base; most methods have none.

        key_values: token ids [1, T] -> by attention path the base's own keys and values, each [H_kv, T, d_h].
        """

    def init_from_start(self, deltas: Mapping[Site, Delta], start: Mapping[str, SiteStart] | None) -> None:
        """Initial values that follow from data; most methods have none. start: by module path; None: none was given."""
        if start is not None:
            raise ConfigError(f"start= gives initial values from data, and {type(self).__name__} takes none")

    def start_options(self, sites: Sequence[Site]) -> dict[str, int]:
        """What `kitout.search.signals` has to collect for its start, as options; {} where it needs no data."""
        return {}

    def without_start(self) -> Method:
        """The config of the same adapter with initial values that need no data; itself where none do."""
        return self

    def after_step(self, deltas: Mapping[Site, Delta], step: int, num_steps: int) -> None:
        """Called by the training loop after each optimizer step, from 0 on, while gradients are there; mostly nothing.

        What it remembers are buffers of the Deltas, which checkpoints keep. The same in all processes.
        """

    def settled_after(self, num_steps: int) -> int:
        """After so many steps of a training of num_steps `after_step` has given the adapter the size it ends with."""
        return 0

    def inference_form(self) -> Method:
        """The config of the adapter whose Deltas are in their `inference_form`."""
        return self

    def num_parameters(self, sites: Sequence[Site]) -> int:
        """Number of trainable parameters over these sites, in closed form (law 7 compares it with the tensors)."""
        raise NotImplementedError

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """What became of the settings at these sites that nobody asked for, a line each; for tables."""
        return []

    def training_defaults(self) -> TrainingDefaults:
        """How to train it with these settings; most settings do not matter for that."""
        return self.training

    def non_default_settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, for tables and cards; many targets as their number."""
        settings = self.model_dump(exclude_defaults=True)
        if len(words := (settings.get("targets") or "").split()) > MAX_LISTED:
            settings["targets"] = f"{len(words)} names"
        return settings


REGISTRY: dict[str, type[Method]] = {}
MethodT = TypeVar("MethodT", bound=Method)


def register(cls: type[MethodT]) -> type[MethodT]:
    """Class decorator: makes a Method known to files, CLI and the law suite under its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def registered_methods() -> Iterator[type[Method]]:
    """Every registered method, in order of registration."""
    yield from REGISTRY.values()
