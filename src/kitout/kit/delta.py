"""The Delta and the Method: the two things a new PEFT method has to write.

A Delta is a map at one site, y' = delta(x, y). It knows nothing of names, batches, other adapters or files. A Method
is a small frozen config that says where and builds the Deltas. Routing, stacking, mixing, strength, merging, counting
and saving are written once over `Delta` alone. This module knows no method and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from kitout.base.select import select
from kitout.errors import ConfigError, Faults, NotMergeable

if TYPE_CHECKING:
    from kitout.base.find import Survey
    from kitout.base.site import Site
    from kitout.base.weights import Frozen

Pair = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class Rate:
    """How AdamW trains a method unless told otherwise, at the top of a short rise and a fall to zero.

    lr: of what the method adds. decay: weight decay of its matrices; vectors, prompts and prefixes never decay
    (`kitout.train.rates`). head: lr of a fresh head that travels with it.
    """

    lr: float = 1e-3
    decay: float = 0.0
    head: float = 3e-3


class Delta(nn.Module):
    """A trained map at one site. Values are channels-last.

    length: positions it adds to a sequence: rows of `tokens` (port "tokens") or keys and values of `past` (port "kv").
    after: its tokens come after the first token of the text (BOS, CLS), not before it.
    pooled: what follows the stack finds the first of its tokens where the text's first was (a classifier reads it).
    reads_weight: True if `forward` also takes the frozen module's view (`Frozen`: its weight [d_out, d_in], its bias,
    and the module itself as a function).
    replaces: True if `forward` does not read y, so the base's product can be skipped when a whole batch wears it.
    elementwise: True if y' = scale * y + shift, so that it folds into a norm's gain or an input axis as well.
    late: its parameters that may learn faster than the rest (LoRA+: the B of B A), by name.
    """

    length: int = 0
    after: bool = False
    pooled: bool = False
    reads_weight: bool = False
    replaces: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    late: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor, y: Tensor, frozen: Frozen | None = None) -> Tensor:
        """x [..., d_in], y [..., d_out] -> [..., d_out], each position on its own. Never writes to x or y."""
        raise NotImplementedError

    def update(self, x: Tensor, y: Tensor, frozen: Frozen | None = None) -> Tensor:
        """`forward`, but y is this call's own and may be overwritten."""
        return self(x, y, frozen) if self.reads_weight else self(x, y)

    def through(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        """y' of a plain frozen linear with weight w and bias b, module and delta in one go.

        Optional, for training: None where the output first and `update` after it is as good.
        """
        return None

    def tokens(self) -> Tensor:
        """Port "tokens": the vectors [length, d] that this site puts into the sequence."""
        raise NotImplementedError

    def past(self) -> tuple[Tensor, Tensor]:
        """Port "kv": keys and values, each [H_kv, length, d_h], that every query sees before those of the text.

        Keys as the attention call takes them: no rotation, projection or norm comes after.
        """
        raise NotImplementedError

    def settled(self) -> Delta:
        """The same map without what only training needs (an encoder of its values); itself where there is none."""
        return self

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """w [d_out, d_in], b [d_out] | None, in working precision -> the same, exactly equal to forward.

        Raises NotMergeable where no weights give the same function. Never writes to w or b.
        """
        raise NotMergeable(f"{type(self).__name__} is not a linear map: no weights give the same function")

    def values(self) -> dict[str, Tensor] | None:
        """Whole parameters by name, for a delta that is a trained copy of a module which is no matrix and no norm."""
        return None

    def origin(self, module: nn.Module) -> dict[str, Tensor]:
        """Where this delta holds trained copies of a frozen module's tensors: those tensors, by the copies' own names.

        Files keep such a copy as its difference from them.
        """
        return {}

    @classmethod
    def batched(
        cls, deltas: Sequence[Any], rows: Sequence[int], x: Tensor, y: Tensor, scratch: dict[str, Any]
    ) -> Tensor | None:
        """Rows of one batch, each through its own delta: row i through deltas[rows[i]], untouched where rows[i] < 0.

        Optional fast path for plain linear sites; y may be overwritten. scratch lives as long as this composition of
        rows at this site. None means there is no fast path here and the caller loops over the deltas.
        """
        return None


class Method(BaseModel):
    """A frozen, keyword-only, validated config: where an adapter sits and what its Deltas are.

    targets: the selection language of `kitout.base.select`; None = the method's own default. layers: "all",
    "last:4", "0,3,5", "decoder/last:4".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)
    mergeable: ClassVar[bool] = True
    identity: ClassVar[bool] = True  # a fresh adapter leaves the outputs bit-identical (law 2)
    still: ClassVar[bool] = False  # trained with the base in eval mode: no dropout, no drop-path
    rate: ClassVar[Rate] = Rate()  # with default settings; ask `advised` where there is a config

    default_targets: ClassVar[str] = "all-linear"
    seat: ClassVar[str] = ""  # where it sits by default, in words; empty: `default_targets` says it
    note: ClassVar[str] = ""  # what rows, a Mix or strengths may not have of it, in words

    targets: str | None = None
    layers: str = "all"

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            faults = Faults(ConfigError, type(self).__name__)
            for e in error.errors():
                where = ".".join(map(str, e["loc"])) or "settings"
                faults.add(f"{where}={e['input']!r}: {e['msg']}" if e["loc"] else e["msg"])
            faults.raise_if_any()

    def sites(self, survey: Survey) -> list[Site]:
        """The chosen sites, in model order. Default: `targets` and `layers` through the selection language."""
        return select(survey.sites, self.targets or self.default_targets, self.layers)

    def common(self, sites: Sequence[Site]) -> nn.Module | None:
        """One module per adapter that every Delta may use (a prefix encoder); None for most."""
        return None

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        """The fresh Delta of one site. When values come from a file, site.module has shapes and no values (meta)."""
        raise NotImplementedError

    def start(self, deltas: Mapping[Site, Delta], past: Callable[[Tensor], Mapping[str, Pair]]) -> None:
        """Fresh values that need a forward of the base; most methods have none.

        past: token ids [1, T] -> by attention path the base's own keys and values of them, each [H_kv, T, d_h].
        """

    def settled(self) -> Method:
        """The config of the adapter whose Deltas are `settled`."""
        return self

    def count(self, sites: Sequence[Site]) -> int:
        """Closed form of the number of trained values over these sites (checked against the tensors by law 7)."""
        raise NotImplementedError

    def advised(self) -> Rate:
        """How to train it with these settings; most settings change nothing about that."""
        return self.rate

    def describe(self) -> dict[str, Any]:
        """The settings that differ from the defaults, for tables and cards."""
        return self.model_dump(exclude_defaults=True)


REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a Method known to files, CLI and the law suite under its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def methods() -> Iterator[type[Method]]:
    """Every registered method, in order of registration."""
    yield from REGISTRY.values()
