"""The kitout method that selects the modules of a PEFT file and has its ranks and alphas.

Selections are tried in this order: by role, as a person would write ("attn.q attn.v"), by module names, by whole paths,
by one regular expression that lists the paths; likewise for ranks and alphas that differ. Each is checked site by site.
It knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import ConfigError, FileError, TargetError
from kitout.files.peft.config import PeftConfig
from kitout.files.peft.read_tensors import adaptable_modules
from kitout.method import Method
from kitout.methods import IA3, LoRA
from kitout.methods.lora import max_rank, value_for_role

SiteTerm = Callable[[Site], str]
SITE_TERMS: tuple[SiteTerm, ...] = (
    lambda s: s.role.replace("cross.", "attn."),  # "attn.q" means cross-attention too
    lambda s: s.role.replace("attn.", "self."),
    lambda s: s.path.rpartition(".")[2],
    lambda s: s.path,
)


def infer_method(
    survey: Survey,
    settings: PeftConfig,
    at_input: Mapping[str, bool],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> tuple[Method, list[Site]]:
    """The method and its sites. at_input: by module path, whether its input is adapted. Raises FileError."""
    modules = [s for s in adaptable_modules(survey).values() if s.path in at_input]
    targets, layers = _selection(survey, modules, at_input)
    if settings.kind == "IA3":
        method: Method = IA3(targets=targets, layers=layers)
        return method, _running(survey, method)
    lora = LoRA(
        rank=_by_term(modules, ranks, "rank"),
        alpha=_by_term(modules, alphas, "alpha"),
        dropout=settings.dropout,
        rslora=settings.rslora,
        dora=settings.dora,
        bias=settings.bias,
        lora_bias=settings.lora_bias,
        clip_rank=all(ranks[s.path] <= max_rank(s) for s in modules),  # a file's own rank is kept
        targets=targets,
        layers=layers,
    )
    return lora, _running(survey, lora)


def _running(survey: Survey, method: Method) -> list[Site]:
    return [s for s in method.sites(survey) if s.path not in survey.unused]


def _selection(survey: Survey, sites: Sequence[Site], at_input: Mapping[str, bool]) -> tuple[str, str]:
    """targets and layers that select exactly these sites."""
    requested = {(s.path, "in" if at_input[s.path] else "out", None) for s in sites}
    for targets, layers in _candidates(sites, at_input):
        try:
            selected = select(survey.sites, targets, layers)
        except TargetError:
            continue
        if {(s.path, s.port, s.channels) for s in selected if s.path not in survey.unused} == requested:
            return targets, layers
    raise FileError(f"no selection matches exactly the {len(sites)} modules of this file: {sites[0].path}, ...")


def _candidates(sites: Sequence[Site], at_input: Mapping[str, bool]) -> Iterator[tuple[str, str]]:
    numbers = sorted({s.layer for s in sites if s.layer is not None})
    layers = ",".join(map(str, numbers)) or "all"
    for term in SITE_TERMS:
        targets = " ".join(dict.fromkeys(("in:" if at_input[s.path] else "") + term(s) for s in sites))
        yield targets, "all"
        yield targets, layers
    ports = {"in:" if at_input[s.path] else "" for s in sites}
    yield " ".join(f"{p}{_path_list(s for s in sites if at_input[s.path] == bool(p))}" for p in sorted(ports)), "all"


def _path_list(sites: Iterable[Site]) -> str:
    """One word that selects exactly these modules, whatever other paths end alike."""
    return "re:" + "|".join(re.escape(s.path).replace(r"\ ", r"\x20") for s in sites)


def _by_term(sites: Sequence[Site], values: Mapping[str, Any], setting: str) -> Any:
    """One number, or numbers by the shortest terms that distinguish the sites."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    for term in SITE_TERMS:
        table = {term(s): values[s.path] for s in sites}
        try:
            if all(value_for_role(table, s, setting) == values[s.path] for s in sites):
                return table
        except ConfigError:
            continue
    return {_path_list(s for s in sites if values[s.path] == value): value for value in dict.fromkeys(values.values())}
