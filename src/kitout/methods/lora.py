"""LoRA and its variants: rsLoRA's scale, DoRA's magnitude, starts from weights or data; rank by role or by path.

Hu et al. 2021 (arXiv 2106.09685), code microsoft/LoRA; Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732: alpha / sqrt r);
Meng et al. 2024 (PiSSA, arXiv 2404.02948); Paischer et al. 2024 (EVA, arXiv 2410.07170); Wang et al. 2024 (LoRA-GA,
arXiv 2407.05000). A ~ kaiming_uniform(a = sqrt 5), B = 0; an embedding's A = 0, B ~ N(0, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor, nn

from kitout.base.select import COMPOSITE_ROLES, MAX_PATTERNS, last_match, names_a_group, select, word_for
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import bias, fan_in, is_matrix_product, weight_matrix
from kitout.delta import Delta
from kitout.errors import ConfigError, Errors, TargetError
from kitout.method import MAX_LISTED, Method, SiteStart, TrainingDefaults, register
from kitout.methods.deltas.adaptive_rank import TripletImportance, cut_after_step, last_cut_step
from kitout.methods.deltas.dora import DoRADelta
from kitout.methods.deltas.low_rank import LowRankDelta
from kitout.methods.deltas.shifted import BIASED_KINDS, ShiftDelta, ShiftedDoRA, ShiftedLowRank
from kitout.methods.deltas.start_from_data import start_from_gradient, start_from_inputs

ByRole = dict[str, int]
BIAS = ("bias",)  # parameter_names of a site where only a bias is trained
FROM_DATA = ("eva", "loraga")  # values of `init` that need a start
PROJECTIONS_OF = {"sub.attn": ("attn.o",), "sub.cross": ("cross.o",), "sub.mlp": ("mlp.down",)}


@register
class LoRA(Method):
    """A low-rank change of selected projections: y' = y + alpha / rank * B A dropout(x).

    rank, alpha: a number, or numbers by role as in {"attn.*": 8, "mlp.*": 16}, or by module path; where every key of
    rank is a path and targets is None, the keys are the targets. alpha None = 2 * rank. dropout: on x.
    rslora: alpha / sqrt rank. dora: renormalize to a learned magnitude. bias: "lora_only" also trains the biases of the
    targets, "all" every bias of the model. lora_bias: a bias on every target, also where there is none. init:
    "default"; "pissa": A and B start as the principal directions of W, whose product is subtracted again, so a new
    adapter is the identity; "eva": A as the leading directions of the site's inputs, B = 0; "loraga": A and B as
    directions of the first gradient, subtracted again like pissa's. The last two need data: `start=` of `kit.add`.
    clip_rank: a site too narrow for the rank takes the rank it can hold, at the same scale;
    False: the rank as it is, even above the width, as PEFT has it. energy: in place of a rank, for `kitout.combine` and
    `kitout.convert` only: the share of the squared singular values that each site keeps. adaptive: each site gets
    its own rank, as in AdaLoRA; `kitout train` cuts the least important triplets until no more parameters are left than
    rank means, and saves a LoRA with ranks by path. start: the multiple of the rank that adaptive begins with.
    """

    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-3, weight_decay=0.01)
    default_targets: ClassVar[str] = "attn.q attn.v"

    rank: int | ByRole = 8
    alpha: float | dict[str, float] | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    rslora: bool = False
    dora: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    lora_bias: bool = False
    init: Literal["default", "pissa", "eva", "loraga"] = "default"
    clip_rank: bool = True
    energy: float | None = Field(default=None, gt=0.0, le=1.0)
    adaptive: bool = False
    start: float = Field(default=1.5, ge=1.0)

    @field_validator("rank")
    @classmethod
    def _check_rank(cls, rank: int | ByRole) -> int | ByRole:
        _check_patterns(rank)
        for r in rank.values() if isinstance(rank, dict) else [rank]:
            if r <= 0:
                raise ValueError(f"rank must be at least 1, found {r}")
        return rank

    @field_validator("alpha")
    @classmethod
    def _check_alpha(cls, alpha: float | dict[str, float] | None) -> float | dict[str, float] | None:
        _check_patterns(alpha)
        for a in alpha.values() if isinstance(alpha, dict) else [1.0 if alpha is None else alpha]:
            if a <= 0:
                raise ValueError(f"alpha must be above 0, found {a}")
        return alpha

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings at their defaults: a file that needs none of them is that of earlier versions."""
        settings: dict[str, Any] = dump(self)
        defaults = {"clip_rank": True, "energy": None, "adaptive": False, "start": 1.5}
        return {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}

    @model_validator(mode="after")
    def _check_settings(self) -> LoRA:
        if self.energy is not None and "rank" in self.model_fields_set:
            raise ValueError("energy chooses a rank for each site: give rank or energy, not both")
        if self.dora and self.init == "pissa":
            raise ValueError(
                "dora=True starts from the whole weight and pissa from its principal directions: choose one"
            )
        if self.dora and self.init == "loraga":
            raise ValueError(
                "dora=True renormalizes the whole weight, and loraga subtracts its start again: choose one"
            )
        if self.adaptive and (self.dora or self.energy is not None or self.init not in ("default", "eva")):
            raise ValueError("adaptive cuts a plain change: leave out dora, energy and a start from weights")
        if self.start != type(self).model_fields["start"].default and not self.adaptive:
            raise ValueError(
                "start is the multiple of the rank that adaptive=True begins with: set that too, or drop it"
            )
        return self

    def selection(self) -> str:
        """Where every key of rank is the path of a module and targets is None, the keys."""
        if self.targets is None and isinstance(self.rank, dict) and _are_paths(self.rank):
            return " ".join(self.rank)
        return super().selection()

    def sites(self, survey: Survey) -> list[Site]:
        """The selected sites. TargetError for a sublayer; ConfigError for a rank that no site named for it can hold."""
        if self.energy is not None:
            raise ConfigError(
                f"energy={self.energy:g} chooses ranks for a change that exists, in kitout.combine and kitout.convert; "
                "a new adapter takes rank="
            )
        sites = super().sites(survey)
        errors = Errors(TargetError, "LoRA")
        for role in sorted({s.role for s in sites if s.role in COMPOSITE_ROLES}):
            inside = [s for s in survey.sites if s.role in PROJECTIONS_OF.get(role, ()) and s.channels is None]
            known = dict.fromkeys(s.role for s in inside)
            hint = f"; write {' or '.join(known)}" if known else ""
            example = next(s.path for s in sites if s.role == role)
            errors.add(f"LoRA over {role} ({example}): it changes a projection, and this is what a sublayer adds{hint}")
        for site in (s for s in sites if s.kind == "other" and s.role not in COMPOSITE_ROLES):
            if not is_matrix_product(site.module):
                errors.add(
                    f"LoRA over {site.path}: a {type(site.module).__name__} does more than multiply by its weight, so "
                    "a low-rank change of its output is none of its weight; choose other targets, or train its "
                    f"parameters: PartialFineTuning(names={site.path + '.*'!r})"
                )
        errors.raise_if_any()
        words = [w for w in self.selection().split() if not w.startswith("-")]
        by_pattern: dict[str, list[Site]] = {}
        for site in sites:
            pattern = pattern_for(self.rank, site, "rank") if isinstance(self.rank, dict) else ""
            by_pattern.setdefault(pattern, []).append(site)
        for pattern, members in by_pattern.items():
            named = not any(map(names_a_group, [pattern] if pattern else words))
            if self.clip_rank and named and all(self.rank_at(s) < self._requested_rank(s) for s in members):
                widest = max(members, key=max_rank)
                raise ConfigError(
                    f"rank {self._requested_rank(widest)} is more than {widest.path} can hold: at most "
                    f"{max_rank(widest)} ({widest.role})"
                )
        return sites if self.bias != "all" else self._with_other_biases(survey, sites)

    def _with_other_biases(self, survey: Survey, targets: list[Site]) -> list[Site]:
        """The targets and every other module with a bias that runs (PEFT leaves out no layer)."""
        occupied = {site.path for site in targets if site.channels is None}
        others = [
            site.replace(parameter_names=BIAS)
            for site in select(survey.sites, "*")
            if site.kind in BIASED_KINDS and site.port != "in" and site.channels is None
            if site.path in survey.used_paths - occupied and bias(site.module, site.bias_name) is not None
        ]
        order = {site.path: i for i, site in reversed(list(enumerate(survey.sites)))}
        return sorted([*targets, *others], key=lambda site: order[site.path])

    def trains_bias_at(self, site: Site) -> bool:
        """A bias is trained at this target: one of an output, not of a row of a table."""
        is_trained = self.lora_bias or (self.bias != "none" and bias(site.module, site.bias_name) is not None)
        return is_trained and site.port != "in" and site.kind in BIASED_KINDS

    def why_not_at_weight(self, site: Site) -> str:
        if site.parameter_names == BIAS:
            return ""
        if self.dropout:
            return "dropout acts on an input: set dropout=0"
        return "no bias is read with it: set lora_bias=False" if self.lora_bias and not site.bias_name else ""

    def _requested_rank(self, site: Site) -> int:
        return int(value_for_role(self.rank, site, "rank"))

    def rank_at(self, site: Site) -> int:
        """The rank of this site: the requested one, or less where the site is narrower; adaptive: the first one."""
        rank = self._requested_rank(site)
        rank = math.floor(self.start * rank + 0.5) if self.adaptive else rank
        return min(rank, max_rank(site)) if self.clip_rank else rank

    def scale_at(self, site: Site) -> float:
        """The same where the rank was clipped."""
        rank = self._requested_rank(site)
        alpha = 2.0 * rank if self.alpha is None else value_for_role(self.alpha, site, "alpha")
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def after_step(self, deltas: Mapping[Site, Delta], step: int, num_steps: int) -> None:
        if not self.adaptive:
            return
        adapted = {site: delta for site, delta in deltas.items() if isinstance(delta, LowRankDelta)}
        final = self.model_copy(update={"adaptive": False})
        start, target = (method._num_in_triplets([*adapted]) for method in (self, final))
        sites = [(site.path, delta, fan_in(site) + site.d_out) for site, delta in adapted.items()]
        cut_after_step(sites, start, target, step, num_steps)

    def settled_after(self, num_steps: int) -> int:
        return last_cut_step(num_steps) if self.adaptive else 0

    def notes(self, sites: Sequence[Site]) -> list[str]:
        clipped = [s for s in sites if s.parameter_names != BIAS and self.rank_at(s) < self._requested_rank(s)]
        if not clipped:
            return []
        kinds: dict[tuple[str, int, int], list[str]] = {}
        for site in clipped:
            name = site.path.rpartition(".")[2]
            kinds.setdefault((name, self._requested_rank(site), self.rank_at(site)), []).append(site.path)
        shown = [f"{len(paths)} x {name} ({old} -> {new})" for (name, old, new), paths in kinds.items()]
        more = f" and {len(shown) - 4} more kinds" if len(shown) > 4 else ""
        return [f"rank clipped to what the site can hold: {', '.join(shown[:4])}{more}"]

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        if site.parameter_names == BIAS:
            return ShiftDelta(site.d_out)
        if site.role in COMPOSITE_ROLES:
            raise TargetError(f"LoRA over {site.role} ({site.path}): it changes a projection")
        if site.port == "in" and (self.dora or self.init != "default"):
            raise ConfigError(
                f"dora and init={self.init!r} read the weight behind an output, and {site.path} is adapted at its input"
            )
        rank, width = self.rank_at(site), fan_in(site)
        scale = self.scale_at(site)
        a, b = init_factors(site, rank, width)
        if self.init == "pissa":
            if rank > max_rank(site):
                raise ConfigError(f"{site.path} has {max_rank(site)} principal directions: pissa has no rank {rank}")
            a, b = pissa_factors(frozen_weight(site), rank, scale)
        is_shifted = self.trains_bias_at(site)
        if self.dora:
            dora = ShiftedDoRA if is_shifted else DoRADelta
            return dora(a, b, frozen_weight(site).norm(dim=1), scale, self.dropout)
        maps_channels = site.kind == "linear" or (site.kind == "conv" and site.port == "in")
        low_rank = ShiftedLowRank if is_shifted else LowRankDelta
        delta = low_rank(a, b, scale, self.dropout, uses_module_map=not maps_channels)
        if self.init in ("pissa", "loraga"):
            delta.subtract_start(a, b)
        if self.adaptive:
            delta.add_module("triplets", TripletImportance(a, b))
        return delta

    def start_options(self, sites: Sequence[Site]) -> dict[str, int]:
        highest = max((self.rank_at(site) for site in sites if site.parameter_names != BIAS), default=1)
        return {"eva": {"directions": highest}, "loraga": {"directions": 0, "loraga": highest}}.get(self.init, {})

    def without_start(self) -> LoRA:
        return self.model_copy(update={"init": "default"}) if self.init in FROM_DATA else self

    def init_from_start(self, deltas: Mapping[Site, Delta], start: Mapping[str, SiteStart] | None) -> None:
        """A and B of eva and loraga. ConfigError names every site that the start says too little about."""
        if self.init not in FROM_DATA:
            if start is not None:
                raise ConfigError(f"start= is for init='eva' or 'loraga', and this is init={self.init!r}")
            return
        if start is None:
            options = "".join(f", {name}={value}" for name, value in self.start_options(list(deltas)).items() if value)
            raise ConfigError(
                f"init={self.init!r} starts from data: kit.add(name, method, start=kitout.search.signals(kit, "
                f"batches{options}))"
            )
        errors = Errors(ConfigError, f"init={self.init!r}")
        init = start_from_inputs if self.init == "eva" else start_from_gradient
        for site, delta in deltas.items():
            if site.parameter_names != BIAS:
                init(site, delta, start.get(site.path), errors)  # type: ignore[arg-type]  # DoRA's has the same factors
        errors.raise_if_any()

    def non_default_settings(self) -> dict[str, Any]:
        """Many ranks or alphas by path as one phrase."""
        settings = super().non_default_settings()
        for name in ("rank", "alpha"):
            values = settings.get(name)
            if isinstance(values, dict) and len(values) > MAX_LISTED:
                settings[name] = f"{min(values.values()):g} to {max(values.values()):g}, by {len(values)} paths"
        return settings

    def num_parameters(self, sites: Sequence[Site]) -> int:
        targets = [s for s in sites if s.parameter_names != BIAS]
        pairs = self._num_in_triplets(targets)
        shifts = sum(s.d_out for s in sites if s.parameter_names == BIAS or self.trains_bias_at(s))
        return pairs + shifts + (sum(s.d_out for s in targets) if self.dora else 0)

    def _num_in_triplets(self, targets: Sequence[Site]) -> int:
        return sum(self.rank_at(s) * (fan_in(s) + s.d_out) for s in targets)


def _check_patterns(value: object) -> None:
    """A setting by role may come from a file, and every regular expression in it has its cost."""
    if isinstance(value, dict) and sum(pattern.startswith("re:") for pattern in value) > MAX_PATTERNS:
        raise ValueError(f"more than {MAX_PATTERNS} regular expressions")


def max_rank(site: Site) -> int:
    """The rank above which a low-rank map at this site has no more functions to offer."""
    return min(fan_in(site), site.d_out)


def value_for_role(value: float | dict[str, int] | dict[str, float], site: Site, description: str) -> float:
    """A setting that may be given by role; the last pattern that matches wins."""
    return value[pattern_for(value, site, description)] if isinstance(value, dict) else value


def pattern_for(values: dict[str, int] | dict[str, float], site: Site, description: str) -> str:
    """The pattern whose value a site has."""
    pattern = last_match(site, tuple(values))
    if pattern is None:
        raise ConfigError(
            f"{description} {str(values)[:200]} has no value for {site.path} ({site.role}): add {site.role!r} or '*'"
        )
    return pattern


def _are_paths(words: Mapping[str, int]) -> bool:
    """Each is the path of a module, and at least one lies in a block: no roles, no groups."""
    are_plain = all(re.fullmatch(r"\w[\w.-]*", word) and word_for(word) == word for word in words)
    return are_plain and any(re.search(r"\.[0-9]+\.", word) for word in words)


def init_factors(site: Site, rank: int, width: int) -> tuple[Tensor, Tensor]:
    """A and B whose product is zero."""
    if isinstance(site.module, nn.Embedding):
        return torch.zeros(rank, width), torch.randn(site.d_out, rank)
    a = torch.empty(rank, width)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, torch.zeros(site.d_out, rank)


def frozen_weight(site: Site) -> Tensor:
    """The site's rows of the frozen weight in fp32."""
    w = weight_matrix(site.module, site.weight_name).detach().float()
    index = site.channels_on(w.device)
    return w if index is None else w[index]


def pissa_factors(w: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A, B with scale * B A = the rank-r truncation of w."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
