"""Prefix tuning: trained keys and values that every query of every attention sees before those of the text.

Li & Liang 2021 (arXiv 2101.00190), eq. 3 and section 4.3: K' = [P_k; K], V' = [P_v; V], raw (no rotation, projection
or norm), text positions shifted by m as after real tokens. Encoder: [P_k, P_v] of all layers = W2 tanh(W1 e + b1) + b2;
in the order k0, v0, k1, v1, ... (jxhe/unify petl/petl_factory.py, and PEFT); dropout on keys and values.
Encoder-decoders have three prefixes (encoder self, decoder self, cross), each with an encoder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey, pyramid_key
from kitout.delta import Delta, KeyValue
from kitout.errors import ConfigError, TargetError
from kitout.method import Method, TrainingDefaults, register

ATTENTION_PLACES = ("encoder", "decoder", "cross")
INIT_STD_FRACTION = (
    0.1  # of the deviation of real keys and values: with all of it noise hides the text (docs/methods.md)
)


class PrefixEncoder(nn.Module):
    """embedding [m, d] -> [m, width] through one hidden layer; computes a slice of the output at a time."""

    def __init__(self, length: int, d: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, d))
        self.first = nn.Linear(d, hidden)
        self.second = nn.Linear(hidden, width)
        self.output_slices: dict[str, slice] = {}  # by site key

    def forward(self, output_slice: slice) -> Tensor:
        return F.linear(
            self.first(self.embedding).tanh(), self.second.weight[output_slice], self.second.bias[output_slice]
        )


class PrefixDelta(Delta):
    """prefix [m, 2, H_kv, d_h]: keys, then values."""

    def __init__(self, prefix: Tensor, dropout: float) -> None:
        super().__init__()
        self.prefix, self.dropout, self.num_tokens = nn.Parameter(prefix), dropout, prefix.shape[0]

    def key_values(self) -> KeyValue:
        return _split_key_values(self.prefix, self.dropout, self.training)

    def key_value_sources(self) -> Iterable[Tensor]:
        return (self.prefix,)


class EncodedPrefixDelta(Delta):
    """The same, computed by an encoder: its own, or a slice of one that is shared and belongs to the adapter."""

    def __init__(
        self, encoder: PrefixEncoder, output_slice: slice, num_kv_heads: int, dropout: float, owns_encoder: bool
    ) -> None:
        super().__init__()
        self.own = encoder if owns_encoder else None
        # In a tuple, which registers nothing: the encoder's parameters are not always this Delta's.
        self._encoder_and_slice: tuple[PrefixEncoder, slice] = (encoder, output_slice)
        self.num_kv_heads, self.dropout, self.num_tokens = num_kv_heads, dropout, encoder.embedding.shape[0]

    def compute_prefix(self) -> Tensor:
        encoder, output_slice = self._encoder_and_slice
        values: Tensor = encoder(output_slice)
        return values.view(self.num_tokens, 2, self.num_kv_heads, -1)

    def key_values(self) -> KeyValue:
        return _split_key_values(self.compute_prefix(), self.dropout, self.training)

    def key_value_sources(self) -> Iterable[Tensor]:
        return self._encoder_and_slice[0].parameters()

    def inference_form(self) -> Delta:
        return PrefixDelta(self.compute_prefix().detach(), self.dropout)


def _split_key_values(prefix: Tensor, dropout: float, training: bool) -> KeyValue:
    if dropout and training:
        prefix = F.dropout(prefix, dropout)
    return prefix[:, 0].transpose(0, 1), prefix[:, 1].transpose(0, 1)  # [H_kv, m, d_h]


@register
class PrefixTuning(Method):
    """Trained keys and values that every attention sees before those of the text.

    length: how many. encoder: hidden width of the MLP that computes them, None = trained flat. shared: one encoder for
    all layers (of each place), or one per layer. dropout: on keys and values. init: "random" (normal, with a tenth of
    the standard deviation of the layer's own keys and values) or the token ids of a text, whose first `length` keys and
    values it starts from. places: any of "encoder decoder cross" that the model has.
    """

    default_location: ClassVar[str] = "every attention call"
    limitations: ClassVar[str] = "strength and Mix are weights of attention, not below 0"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(3e-2, min_steps=200)
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False

    length: int = Field(default=16, ge=1)
    encoder: int | None = Field(default=None, ge=1)
    shared: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init: Literal["random"] | tuple[int, ...] = "random"
    places: str = "encoder decoder cross"

    @model_validator(mode="after")
    def _check_settings(self) -> PrefixTuning:
        places = self.places.split()
        if not places or set(places) - set(ATTENTION_PLACES):
            raise ValueError(f"places={self.places!r}: write any of {' '.join(ATTENTION_PLACES)!r}")
        if self.targets is not None:
            raise ValueError("a prefix sits at attention calls: choose places= and layers=, not targets=")
        if self.init != "random" and (self.encoder is not None or len(self.init) < self.length):
            raise ValueError(f"init from text needs encoder=None and at least length={self.length} tokens")
        if not self.shared and self.encoder is None:
            raise ValueError("shared=False means one encoder per layer: give encoder=")
        return self

    def sites(self, survey: Survey) -> list[Site]:
        causal = {t.path: t.causal for t in survey.towers}

        def place(site: Site) -> str:
            return "cross" if site.role == "kv.cross" else "decoder" if causal[site.tower] else "encoder"

        if not survey.kv_sites:
            path, why = next(
                iter(survey.kv_refusals.items()), ("this model", survey.unproven_reason or "no attention was seen")
            )
            raise TargetError(f"PrefixTuning finds no attention to add to: {path}: {why}")
        places = self.places.split()
        sites = [s for s in select(survey.kv_sites, "kv.*", self.layers) if place(s) in places]
        if not sites:
            raise TargetError(f"places={self.places!r}: this model has {sorted({place(s) for s in survey.kv_sites})}")
        if all(s.shares_kv_of for s in sites):
            raise TargetError(
                f"layers={self.layers!r}: {sites[0].path} attends to the keys of {sites[0].shares_kv_of}, so its "
                "prefix is the one there: choose layers= with that one"
            )
        sites = [s for s in sites if not s.shares_kv_of]  # they see the prefix of the layer whose keys they see
        for site in sites:
            if 0 < site.sliding_window <= self.length:
                full = sorted({s.layer for s in sites if not s.sliding_window and s.layer is not None})
                raise TargetError(
                    f"{site.path} has a sliding window of {site.sliding_window} and would drop a prefix of "
                    f"{self.length}: shorten it"
                    + (f", or choose layers={','.join(map(str, full))!r}, with full attention" if full else "")
                )
        pyramids = {pyramid_key(s.tower) for s in sites}
        for path, why in survey.kv_refusals.items():
            if any(pyramid_key(path).startswith(f"{pyramid}.") for pyramid in pyramids):
                raise TargetError(f"PrefixTuning cannot reach {path}: {why}")
        return sites

    def build_shared(self, sites: Sequence[Site]) -> nn.Module | None:
        if self.encoder is None or not self.shared:
            return None
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(_encoder_name(site), []).append(site)
        encoders = nn.ModuleDict()
        for name, group in groups.items():
            encoder = PrefixEncoder(self.length, group[0].d_in, self.encoder, sum(2 * s.d_out for s in group))
            stop = 0
            for site in group:
                start, stop = stop, stop + 2 * site.d_out
                encoder.output_slices[site.key] = slice(start, stop)
            encoders[name] = encoder
        return encoders

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        if self.encoder is None:
            k, v = (INIT_STD_FRACTION * deviation for deviation in site.probe_std or (1.0, 1.0))
            shape = (self.length, site.num_kv_heads, site.d_out // site.num_kv_heads)
            return PrefixDelta(torch.stack((torch.randn(shape) * k, torch.randn(shape) * v), 1), self.dropout)
        if isinstance(shared, nn.ModuleDict):
            encoder = shared[_encoder_name(site)]
            assert isinstance(encoder, PrefixEncoder)
            return EncodedPrefixDelta(
                encoder, encoder.output_slices[site.key], site.num_kv_heads, self.dropout, owns_encoder=False
            )
        encoder = PrefixEncoder(self.length, site.d_in, self.encoder, 2 * site.d_out)
        return EncodedPrefixDelta(encoder, slice(0, 2 * site.d_out), site.num_kv_heads, self.dropout, owns_encoder=True)

    def init_from_forward(
        self, deltas: Mapping[Site, Delta], key_values: Callable[[Tensor], Mapping[str, KeyValue]]
    ) -> None:
        if self.init == "random":
            return
        by_path = key_values(torch.tensor([self.init]))
        missing = [s.path for s in deltas if s.path not in by_path]
        if missing:
            raise ConfigError(f"init: a text has no keys and values at {missing[0]}; use places= to leave it out")
        for site, delta in deltas.items():
            assert isinstance(delta, PrefixDelta)
            k, v = (t[:, : self.length].transpose(0, 1) for t in by_path[site.path])  # [m, H_kv, d_h]
            delta.prefix.copy_(torch.stack((k, v), 1))

    def training_defaults(self) -> TrainingDefaults:
        """With an encoder, whose weights all keys and values share, the learning rate is 3e-4."""
        return self.training if self.encoder is None else TrainingDefaults(3e-4)

    def inference_form(self) -> PrefixTuning:
        return self if self.encoder is None else self.model_copy(update={"encoder": None, "shared": True})

    def num_parameters(self, sites: Sequence[Site]) -> int:
        if self.encoder is None:
            return sum(2 * self.length * s.d_out for s in sites)
        widths = {_encoder_name(s) if self.shared else s.key: s.d_in for s in sites}  # one per encoder
        first = sum(self.length * d + d * self.encoder + self.encoder for d in widths.values())
        return first + sum((self.encoder + 1) * 2 * s.d_out for s in sites)


def _encoder_name(site: Site) -> str:
    return f"{site.tower}@{site.role}".replace(".", "/")
