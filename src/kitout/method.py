"""The Method: a frozen config that says where an adapter sits and builds its Deltas. All that a new method writes.

`register` makes it known to files, the command line and the law suite. It knows sites and Deltas, and nothing of kits,
routes or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta, KeyValue
from kitout.errors import ConfigError, Errors


@dataclass(frozen=True)
class TrainingDefaults:
    """How AdamW trains a method unless told otherwise, at the top of a short rise and a fall to zero.

    lr: of what the method adds. decay: weight decay of its matrices; vectors, prompts and prefixes never decay
    (`kitout.train.loop.optimizer`). head: lr of a fresh head that travels with it.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    head_lr: float = 3e-3


class Method(BaseModel):
    """A frozen, keyword-only, validated config: where an adapter sits and what its Deltas are.

    targets: the selection language of `kitout.base.select`; None = the method's own default. layers: "all",
    "last:4", "0,3,5", "decoder/last:4".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)
    mergeable: ClassVar[bool] = True
    starts_as_identity: ClassVar[bool] = True  # a fresh adapter leaves the outputs bit-identical (law 2)
    trains_in_eval_mode: ClassVar[bool] = False  # trained with the base in eval mode: no dropout, no drop-path
    training: ClassVar[TrainingDefaults] = (
        TrainingDefaults()
    )  # with default settings; ask `advised` where there is a config

    default_targets: ClassVar[str] = "all-linear"
    default_location: ClassVar[str] = ""  # where it sits by default, in words; empty: `default_targets` says it
    limitations: ClassVar[str] = ""  # what rows, a Mix or strengths may not have of it, in words

    targets: str | None = None
    layers: str = "all"

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            faults = Errors(ConfigError, type(self).__name__)
            for e in error.errors():
                where = ".".join(map(str, e["loc"])) or "settings"
                faults.add(f"{where}={e['input']!r}: {e['msg']}" if e["loc"] else e["msg"])
            faults.raise_if_any()

    def sites(self, survey: Survey) -> list[Site]:
        """The chosen sites, in model order. Default: `targets` and `layers` through the selection language."""
        return select(survey.sites, self.targets or self.default_targets, self.layers)

    def build_shared(self, sites: Sequence[Site]) -> nn.Module | None:
        """One module per adapter that every Delta may use (a prefix encoder); None for most."""
        return None

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        """The fresh Delta of one site. When values come from a file, site.module has shapes and no values (meta)."""
        raise NotImplementedError

    def init_from_forward(
        self, deltas: Mapping[Site, Delta], key_values: Callable[[Tensor], Mapping[str, KeyValue]]
    ) -> None:
        """Fresh values that need a forward of the base; most methods have none.

        past: token ids [1, T] -> by attention path the base's own keys and values of them, each [H_kv, T, d_h].
        """

    def inference_form(self) -> Method:
        """The config of the adapter whose Deltas are `settled`."""
        return self

    def num_parameters(self, sites: Sequence[Site]) -> int:
        """Closed form of the number of trained values over these sites (checked against the tensors by law 7)."""
        raise NotImplementedError

    def training_defaults(self) -> TrainingDefaults:
        """How to train it with these settings; most settings change nothing about that."""
        return self.training

    def non_default_settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, for tables and cards."""
        return self.model_dump(exclude_defaults=True)


REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a Method known to files, CLI and the law suite under its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def registered_methods() -> Iterator[type[Method]]:
    """Every registered method, in order of registration."""
    yield from REGISTRY.values()
