"""The one selection language over sites: `targets="attn.q in:mlp.down"`, `layers="last:4"` -> list of Sites.

Every method, the kit and the command line select sites through it. Each term of `targets` and each index of `layers`
must match something; all errors of one request are raised together. The grammar is written out in `select`. It knows
sites and nothing else: no model, no method.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kitout.base.layers import layer_filter
from kitout.base.site import ROLES, Site
from kitout.errors import Errors, TargetError, suggest

GROUPS = ("attn", "self", "cross", "mlp", "sub", "kv")
SIMPLE_ROLES = tuple(role for role in ROLES if "." not in role)
# Sites that are not leaf modules: a wildcard path never matches them.
COMPOSITE_ROLES = ("block", "sub.attn", "sub.cross", "sub.mlp")


@dataclass(frozen=True)
class TargetTerm:
    """One word of `targets`."""

    text: str
    """As written."""
    matches: Callable[[Site], bool]
    """A test on sites."""
    at_input: bool
    """It has the prefix "in:"."""


def select(sites: Sequence[Site], targets: str, layers: str = "all") -> list[Site]:
    """The selected sites in model order, each once.

    targets: words separated by spaces, each one of
        attn.q mlp.* norm embed head patch   roles; "attn." means self- and cross-attention, "self." and "cross." one
        all-linear                           every linear inside the blocks, never a head or a router
        model.layers.*.self_attn.q_proj      a module path or glob; the end of a path ("q_proj") is enough
        in:mlp.down                          the same place, at the module's input
    A role with a wildcard, all-linear and paths select whole modules; "attn.q" also selects the q channels of a fused
    projection where they are known.
    layers: "all" | "last:4" (of each tower) | "0,3,5" | "2-5" | "decoder/last:4" (towers whose path contains
    "decoder"); several separated by ";".
    """
    errors = Errors(TargetError, f"targets={targets!r}, layers={layers!r}")
    terms = [
        TargetTerm(word, _matcher(word.removeprefix("in:")), at_input=word.startswith("in:"))
        for word in targets.split()
    ]
    if not terms:
        errors.add(f"targets is empty; write roles, paths or all-linear. This model has {_inventory(sites)}")
    in_layers = layer_filter(layers, sites, errors)
    layers_are_valid = not errors.messages  # if not, a term without a site in them is not reported as well
    selected: dict[tuple[str, str, str, tuple[int, ...] | None], Site] = {}
    for term in terms:
        matching = [site for site in sites if term.matches(site)]
        allowed = [site for site in matching if in_layers(site)]
        if not matching:
            errors.add(_no_match(term, sites))
        elif not allowed and layers_are_valid:
            errors.add(_wrong_layers(term, matching))
        for site in allowed:
            if term.at_input:
                site = site.replace(port="in", d_out=site.d_in, channels=None)
            # A module has one input, whatever its role; at its output a projection may also end a sublayer.
            selected.setdefault((site.path, "" if term.at_input else site.role, site.port, site.channels), site)
    errors.raise_if_any()
    order = {(site.path, site.role, site.channels): i for i, site in enumerate(sites)}
    first = {site.path: i for i, site in reversed(list(enumerate(sites)))}
    return sorted(selected.values(), key=lambda s: order.get((s.path, s.role, s.channels), first[s.path]))


def matches(site: Site, word: str) -> bool:
    """True if one word of the language selects this site or the whole module it is a part of: for settings by role."""
    return _matcher(word)(site.replace(channels=None))


def named_matches(sites: Sequence[Site], targets: str) -> dict[str, list[Site]]:
    """Word -> the sites it selects, for the words that name modules: by path or by a plain name, not by a pattern."""
    words = (word.removeprefix("in:") for word in targets.split())
    named = [w for w in words if w != "all-linear" and not _is_role(w) and re.fullmatch(r"\w[\w.]*", w)]
    return {word: [site for site in sites if _matcher(word)(site)] for word in named}


def _matcher(word: str) -> Callable[[Site], bool]:
    """The test on sites that one word (without "in:") stands for."""
    if word == "all-linear":
        return lambda s: (
            s.kind == "linear"
            and s.layer is not None
            and s.channels is None
            and s.role not in COMPOSITE_ROLES
            and not s.is_router
        )
    if _is_role(word):
        roles, has_star = _roles_of(word) if "." in word else {word}, "*" in word
        return lambda s: s.role in roles and not (has_star and s.channels is not None)
    has_wildcard = any(c in word for c in "*?[")
    return lambda s: (
        s.channels is None
        and not (has_wildcard and s.role in COMPOSITE_ROLES)
        and (fnmatchcase(s.path, word) or fnmatchcase(s.path, f"*.{word}"))
    )


def _is_role(word: str) -> bool:
    """True for attn.q, mlp.*, norm: words made of `ROLES`, not paths that start alike."""
    group, dot, part = word.partition(".")
    if not dot:
        return word in SIMPLE_ROLES
    return group in GROUPS and (part == "*" or bool(_roles_of(word)))


def _roles_of(word: str) -> set[str]:
    """The roles one word stands for: "attn.q" -> attn.q and cross.q."""
    group, _, part = word.partition(".")
    groups = {"attn": ("attn", "cross"), "self": ("attn",)}.get(group, (group,))
    return {role for g in groups for role in ROLES if fnmatchcase(role, f"{g}.{part}")}


def _no_match(term: TargetTerm, sites: Sequence[Site]) -> str:
    """Why the term matches nothing, what the model has, what to write."""
    word = term.text.removeprefix("in:")
    counts = Counter(site.role for site in sites)
    group, _, part = word.partition(".")
    if _is_role(word) and part in ("q", "k", "v"):
        fused = [role for role in _roles_of(f"{group}.qkv") if counts[role]]
        if fused:
            return (
                f"{term.text!r} matches no site: this model fuses its projections ({counts[fused[0]]} x {fused[0]}) "
                f"and their channels are not known. Write {fused[0]!r} for the whole projection, or attach with an "
                "example batch so that the channels are found: kitout.attach(model, example_batch=batch)"
            )
    if "," in word:
        return f"{term.text!r} matches no site: targets are separated by spaces, {' '.join(word.split(','))!r}"
    if _is_role(word) or re.fullmatch(rf"({'|'.join(GROUPS)})\.\w+", word):
        return f"{term.text!r} matches no site; this model has {_inventory(sites)}. {suggest(word, sorted(counts))}"
    ends = {".".join(site.path.split(".")[-n:]) for site in sites for n in (1, 2)} | set(ROLES) | {"all-linear"}
    return (
        f"{term.text!r} is not a role and matches no module path; {suggest(word, sorted(ends))}. Roles of this model: "
        f"{_inventory(sites)}"
    )


def _wrong_layers(term: TargetTerm, sites: Sequence[Site]) -> str:
    """The term matches sites, but none in the requested layers. sites: those it matches."""
    if all(site.layer is None for site in sites):
        return f"{term.text!r} is outside the blocks ({sites[0].path}); it is only selected with layers='all'"
    layers_of: dict[str, list[int]] = {}
    for site in sites:
        if site.layer is not None and site.layer not in layers_of.setdefault(site.tower, []):
            layers_of[site.tower].append(site.layer)
    listed = "; ".join(f"{tower}: {','.join(map(str, layers))}" for tower, layers in layers_of.items())
    return f"{term.text!r} is in none of these layers; it is in {listed}"


def _inventory(sites: Sequence[Site]) -> str:
    """Roles with counts, in the order of `ROLES`."""
    counts = Counter(site.role for site in sites)
    return ", ".join(f"{role} ({counts[role]})" for role in ROLES if counts[role]) or "no sites"
