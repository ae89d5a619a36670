"""Words for a given set of sites: the `targets`, `layers` and `rank` of a LoRA that sits exactly there.

An adapter's sites are found again from its config when it is loaded, so a fused adapter needs words that select its
sites and no others. Every candidate is tried on the model. It knows the selection language and LoRA's settings, and
nothing of what an adapter changes there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from kitout.base.select import word_for
from kitout.base.site import Site
from kitout.errors import KitoutError, TargetError
from kitout.method import Method
from kitout.methods.lora import BIAS, LoRA
from kitout.runtime.build_adapter import select_sites
from kitout.runtime.state import KitState


def selected(state: KitState, method: Method, heads: Iterable[str] = ()) -> list[Site]:
    """The sites that a method gets on this base, as `kit.add` finds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_sites(state, method, heads, "a fused adapter")[0]


def words_for(
    state: KitState,
    sites: Sequence[Site],
    like: Sequence[Method],
    heads: Iterable[str] = (),
    make: Callable[[str, str], Method] = lambda targets, layers: LoRA(rank=1, targets=targets, layers=layers),
) -> tuple[str, str] | None:
    """targets and layers that select exactly these sites; None where no words do.

    like: whose words are tried first. make: the method that has them.
    """
    wanted = {site.key for site in sites}
    roles = " ".join(dict.fromkeys(_word(site, site.role) for site in sites))
    layers = sorted({site.layer for site in sites if site.layer is not None})
    patterns: list[str] = []
    candidates = [(m.selection(), m.layers) for m in like]
    candidates += [(roles, "all"), (roles, ",".join(map(str, layers)) or "all")]
    candidates.append((" ".join(dict.fromkeys(_word(site, word_for(site.path)) for site in sites)), "all"))
    for port in dict.fromkeys(_word(site, "") for site in sites):  # where one path is the end of another
        paths = dict.fromkeys(re.escape(site.path) for site in sites if _word(site, "") == port)
        patterns.append(f"{port}re:{'|'.join(paths)}")
    candidates.append((" ".join(patterns), "all"))
    for targets, chosen in dict.fromkeys(candidates):
        try:
            found = selected(state, make(targets, chosen), heads)
        except KitoutError:
            continue
        if {site.key for site in found} == wanted:
            return targets, chosen
    return None


def _word(site: Site, name: str) -> str:
    return f"in:{name}" if site.port == "in" else name


def with_ranks(state: KitState, method: LoRA, sites: Sequence[Site], ranks: Mapping[str, int]) -> LoRA:
    """The method with these ranks, by site path: its own setting, one number, or numbers by role, or by path."""
    targets = [site for site in sites if site.parameter_names != BIAS]
    choices: list[int | dict[str, int]] = [] if method.energy is not None else [method.rank]
    if len(set(ranks.values())) == 1:
        choices.append(next(iter(ranks.values())))
    roles = sorted(dict.fromkeys(site.role for site in targets), key=lambda role: role.startswith("cross."))
    choices.append({role: max(ranks[s.path] for s in targets if s.role == role) for role in roles})
    choices.append({path: ranks[path] for path in sorted(ranks, key=len)})  # the last that matches wins
    for rank in choices:
        # Built anew, not copied: a rank that was set counts as set.
        settings = method.model_dump(exclude={"energy", "rank"}, exclude_unset=True)
        new = LoRA(**settings, rank=rank)
        try:
            found = {site.key for site in selected(state, new)}
            if found >= {s.key for s in targets} and all(new.rank_at(s) == ranks[s.path] for s in targets):
                return new
        except KitoutError:
            continue
    raise TargetError("these sites have no common setting of ranks")
