"""The one selection language over sites: `targets="attn.q in:mlp.down"`, `layers="last:4"` -> list of Sites.

Every method, the kit and the command line choose places through it. It knows sites and nothing else: no model, no
method. Nothing is silent: each item of `targets` and each index of `layers` must find something; all faults of one
request are raised together. The grammar is written out in `select`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kitout.base.layers import layer_filter
from kitout.base.site import ROLES, Site
from kitout.errors import Errors, TargetError, suggest

GROUPS = ("attn", "self", "cross", "mlp", "sub", "kv")
SIMPLE_ROLES = tuple(role for role in ROLES if "." not in role)
COMPOSITE_ROLES = (
    "block",
    "sub.attn",
    "sub.cross",
    "sub.mlp",
)  # places that are no leaf module: never caught by a wildcard path


@dataclass(frozen=True)
class TargetTerm:
    """One word of `targets`. text: as written. matches: on a site. inward: it had the prefix "in:"."""

    text: str
    matches: Callable[[Site], bool]
    at_input: bool


def select(sites: Sequence[Site], targets: str, layers: str = "all") -> list[Site]:
    """The chosen sites in model order, each once.

    targets: words separated by spaces, each one of
        attn.q mlp.* norm embed head patch   roles; "attn." means self- and cross-attention, "self." and "cross." one
        all-linear                           every linear inside the blocks, never a head
        model.layers.*.self_attn.q_proj      a module path or glob; the end of a path ("q_proj") is enough
        in:mlp.down                          the same place, at the module's input
    A role with a wildcard, all-linear and paths choose whole modules; "attn.q" also finds the q channels of a fused
    projection where they are known.
    layers: "all" | "last:4" (of each tower) | "0,3,5" | "2-5" | "decoder/last:4" (towers whose path contains
    "decoder"); several separated by ";".
    """
    faults = Errors(TargetError, f"targets={targets!r}, layers={layers!r}")
    items = [_parse_term(word) for word in targets.split()]
    if not items:
        faults.add(f"targets is empty; write roles, paths or all-linear. This model has {_inventory(sites)}")
    allowed = layer_filter(layers, sites, faults)
    readable = not faults.messages  # else what lies outside the layers is not the item's fault
    chosen: dict[tuple[str, str, str, tuple[int, ...] | None], Site] = {}
    for item in items:
        found = [site for site in sites if item.matches(site)]
        kept = [site for site in found if allowed(site)]
        if not found:
            faults.add(_no_match(item, sites))
        elif not kept and readable:
            faults.add(_wrong_layers(item, found))
        for site in kept:
            seen = site.replace(port="in", d_out=site.d_in, channels=None) if item.at_input else site
            # A module has one input, whatever it is called; at its output a projection may also end a sublayer.
            chosen.setdefault((seen.path, "" if item.at_input else seen.role, seen.port, seen.channels), seen)
    faults.raise_if_any()
    order = {(site.path, site.role, site.channels): i for i, site in enumerate(sites)}
    first = {site.path: i for i, site in reversed(list(enumerate(sites)))}
    return sorted(chosen.values(), key=lambda s: order.get((s.path, s.role, s.channels), first[s.path]))


def matches(site: Site, word: str) -> bool:
    """True if one word of the language means this site or the whole it is a part of (settings given by role)."""
    return _matcher(word)(site.replace(channels=None))


def _parse_term(text: str) -> TargetTerm:
    word = text.removeprefix("in:")
    return TargetTerm(text, _matcher(word), at_input=word != text)


def _matcher(word: str) -> Callable[[Site], bool]:
    if word == "all-linear":
        return lambda s: (
            s.kind == "linear" and s.layer is not None and s.channels is None and s.role not in COMPOSITE_ROLES
        )
    if _is_role(word):
        return _role_matcher(word)
    wild = any(c in word for c in "*?[")
    return lambda s: (
        s.channels is None
        and not (wild and s.role in COMPOSITE_ROLES)
        and (fnmatchcase(s.path, word) or fnmatchcase(s.path, f"*.{word}"))
    )


def _is_role(word: str) -> bool:
    """attn.q, mlp.*, norm: the words of `ROLES`, not a path that happens to start alike."""
    group, dot, part = word.partition(".")
    if not dot:
        return word in SIMPLE_ROLES
    return group in GROUPS and (part == "*" or bool(_roles_of(word)))


def _roles_of(word: str) -> set[str]:
    """The roles one word stands for: "attn.q" -> attn.q and cross.q."""
    group, _, part = word.partition(".")
    groups = {"attn": ("attn", "cross"), "self": ("attn",)}.get(group, (group,))
    return {role for g in groups for role in ROLES if fnmatchcase(role, f"{g}.{part}")}


def _role_matcher(word: str) -> Callable[[Site], bool]:
    wanted = _roles_of(word) if "." in word else {word}
    wild = "*" in word
    return lambda s: s.role in wanted and not (wild and s.channels is not None)


def _no_match(term: TargetTerm, sites: Sequence[Site]) -> str:
    """Why this item found nothing, what there is, what to write."""
    word = term.text.removeprefix("in:")
    here = Counter(site.role for site in sites)
    group, _, part = word.partition(".")
    if _is_role(word) and part in ("q", "k", "v"):
        fused = [role for role in _roles_of(f"{group}.qkv") if here[role]]
        if fused:
            return (
                f"{term.text!r} matches no site: this model fuses its projections ({here[fused[0]]} x {fused[0]}) and "
                f"their channels are not known. Write {fused[0]!r} for the whole projection, or attach with an example "
                "batch so that the channels are found: kitout.attach(model, example_batch=batch)"
            )
    if "," in word:
        return f"{term.text!r} matches no site: items are separated by spaces, {' '.join(word.split(','))!r}"
    if _is_role(word) or re.fullmatch(rf"({'|'.join(GROUPS)})\.\w+", word):
        return f"{term.text!r} matches no site; this model has {_inventory(sites)}. {_suggest_close(word, here)}"
    ends = {".".join(site.path.split(".")[-n:]) for site in sites for n in (1, 2)} | set(ROLES) | {"all-linear"}
    return (
        f"{term.text!r} is no role and matches no module path; {_suggest_close(word, ends)}. Roles here: "
        f"{_inventory(sites)}"
    )


def _suggest_close(word: str, candidates: Iterable[str]) -> str:
    return suggest(word, sorted(candidates))


def _wrong_layers(term: TargetTerm, sites: Sequence[Site]) -> str:
    """The item exists, but not in the layers asked for."""
    if all(site.layer is None for site in sites):
        return f"{term.text!r} lies outside the blocks ({sites[0].path}); it is only chosen with layers='all'"
    where: dict[str, list[int]] = {}
    for site in sites:
        if site.layer is not None and site.layer not in where.setdefault(site.tower, []):
            where[site.tower].append(site.layer)
    told = "; ".join(f"{tower}: {','.join(map(str, layers))}" for tower, layers in where.items())
    return f"{term.text!r} is in none of these layers; it is in {told}"


def _inventory(sites: Sequence[Site]) -> str:
    """Roles with counts, in the order of `ROLES`."""
    count = Counter(site.role for site in sites)
    return ", ".join(f"{role} ({count[role]})" for role in ROLES if count[role]) or "no sites"
