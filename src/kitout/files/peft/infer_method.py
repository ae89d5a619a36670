"""The method that says in kitout's words where a PEFT file sits and how large it is.

A selection is looked for that a person would write ("attn.q attn.v"), then one by module names, then by whole paths;
likewise for ranks and alphas that differ. Whatever is found is checked site by site. It knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import ConfigError, FileError, TargetError
from kitout.files.peft.config import Settings
from kitout.files.peft.read_tensors import carriers
from kitout.method import Method
from kitout.methods import IA3, LoRA
from kitout.methods.lora import by_role

Word = Callable[[Site], str]
WORDS: tuple[Word, ...] = (
    lambda s: s.role.replace("cross.", "attn."),  # "attn.q" means cross-attention too
    lambda s: s.role.replace("attn.", "self."),
    lambda s: s.path.rpartition(".")[2],
    lambda s: s.path,
)


def method_for(
    survey: Survey,
    settings: Settings,
    inward: Mapping[str, bool],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> tuple[Method, list[Site]]:
    """The method and its sites. inward: by module path, whether the module's input is meant. Raises FileError."""
    whole = [s for s in carriers(survey).values() if s.path in inward]
    targets, layers = _selection(survey, whole, inward)
    if settings.kind == "IA3":
        method: Method = IA3(targets=targets, layers=layers)
        return method, method.sites(survey)
    lora = LoRA(
        rank=_by_word(whole, ranks, "rank"),
        alpha=_by_word(whole, alphas, "alpha"),
        dropout=settings.dropout,
        rslora=settings.rslora,
        dora=settings.dora,
        targets=targets,
        layers=layers,
    )
    return lora, lora.sites(survey)


def _selection(survey: Survey, wanted: Sequence[Site], inward: Mapping[str, bool]) -> tuple[str, str]:
    """targets and layers that choose exactly these sites."""
    meant = {(s.path, "in" if inward[s.path] else "out", None) for s in wanted}
    for targets, layers in _candidates(wanted, inward):
        try:
            found = select(survey.sites, targets, layers)
        except TargetError:
            continue
        if {(s.path, s.port, s.channels) for s in found} == meant:
            return targets, layers
    raise FileError(f"no selection chooses exactly the {len(wanted)} modules of this file: {wanted[0].path}, ...")


def _candidates(wanted: Sequence[Site], inward: Mapping[str, bool]) -> Iterator[tuple[str, str]]:
    numbers = sorted({s.layer for s in wanted if s.layer is not None})
    some = ",".join(map(str, numbers)) or "all"
    for word in WORDS:
        targets = " ".join(dict.fromkeys(("in:" if inward[s.path] else "") + word(s) for s in wanted))
        yield targets, "all"
        yield targets, some


def _by_word(sites: Sequence[Site], values: Mapping[str, Any], what: str) -> Any:
    """One number, or numbers by the shortest words that tell the sites apart."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    for word in WORDS:
        table = {word(s): values[s.path] for s in sites}
        try:
            if all(by_role(table, s, what) == values[s.path] for s in sites):
                return table
        except ConfigError:
            continue
    raise FileError(f"{what} differs between modules whose paths end alike: no setting by name can tell them apart")
