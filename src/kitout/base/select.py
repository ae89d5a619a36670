"""The one selection language over sites: `targets="attn.q in:mlp.down"`, `layers="last:4"` -> list of Sites.

Every method, the kit and the command line select sites through it. Each term of `targets`, exclusions included, and
each index of `layers` must match something; all errors of one request are raised together. The grammar is written out
in `select`. It knows sites and nothing else: no model, no method.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from kitout.base.layers import layer_filter
from kitout.base.path_patterns import PathPattern
from kitout.base.site import ROLES, Site
from kitout.errors import Errors, TargetError, suggest

GROUPS = ("attn", "self", "cross", "mlp", "sub", "kv")
SIMPLE_ROLES = tuple(role for role in ROLES if "." not in role)
# Sites that are not leaf modules: a wildcard path never selects them.
COMPOSITE_ROLES = ("block", "sub.attn", "sub.cross", "sub.mlp")


MAX_PATTERNS = 50  # "re:" words of one selection: they may come from a file, and each has its cost


@dataclass(frozen=True)
class TargetTerm:
    """One word of `targets`."""

    text: str
    """As written."""
    word: str
    """Without "-" and "in:"."""
    matches: Callable[[Site], bool]
    """A test on sites."""
    at_input: bool
    """It has the prefix "in:"."""
    excludes: bool
    """It has the prefix "-"."""


def select(sites: Sequence[Site], targets: str, layers: str = "all") -> list[Site]:
    """The selected sites in model order, each once.

    targets: words separated by spaces, in any order, each one of
        attn.q mlp.* norm embed head patch   roles; "attn." means self- and cross-attention, "self." and "cross." one
        all-linear                           every linear inside the blocks, never a head or a router
        model.layers.*.self_attn.q_proj      a module path or glob; the end of a path ("q_proj") is enough
        re:.*[.]1[.].*_proj                  a regular expression on the whole path, as PEFT's target_modules
        in:mlp.down                          the same place, at the module's input
        -lm_head -mlp.gate -re:.*gate        an exclusion: what the word selects is left out
    A role with a wildcard, all-linear and paths select whole modules; "attn.q" also selects the q channels of a fused
    projection where they are known. A path means the module itself; a sublayer that ends there is meant by its role.
    layers: "all" | "last:4" (of each tower) | "0,3,5" | "2-5" | "decoder/last:4" (towers whose path contains
    "decoder"); several separated by ";".
    """
    errors = Errors(TargetError, f"targets={targets!r}, layers={layers!r}")
    terms = _parse(targets, sites, errors)
    in_layers = layer_filter(layers, sites, errors)
    layers_are_valid = not errors.messages  # if not, a term without a site in them is not reported as well
    order = {(site.path, site.role, site.channels): i for i, site in enumerate(sites)}
    first = {site.path: i for i, site in reversed(list(enumerate(sites)))}

    def place(site: Site) -> tuple[int, bool]:
        return order.get((site.path, site.role, site.channels), first[site.path]), site.port == "in"

    selected: dict[tuple[str, str, str, tuple[int, ...] | None], Site] = {}
    excluded: list[tuple[TargetTerm, Site]] = []
    for term in terms:
        matching = _matching_sites(term, sites, selected.values())
        allowed = [site for site in matching if in_layers(site)]
        if not matching:
            errors.add(_no_match(term, sites))
        elif term.excludes:
            excluded += [(term, site) for site in matching]
        elif not allowed and layers_are_valid:
            errors.add(_wrong_layers(term, matching))
        else:
            for site in allowed:
                if term.at_input:
                    site = site.replace(port="in", d_out=site.d_in, channels=None)
                # A module has one input, whatever its role; at its output a projection may also end a sublayer.
                key = (site.path, "" if term.at_input else site.role, site.port, site.channels)
                selected[key] = min(selected.get(key, site), site, key=place)
    remaining = _without(list(selected.values()), excluded, errors)
    if selected and not remaining:
        errors.add("nothing is left after the exclusions")
    errors.raise_if_any()
    return sorted(remaining, key=place)


def _parse(targets: str, sites: Sequence[Site], errors: Errors) -> list[TargetTerm]:
    """The words of `targets`, exclusions last."""
    terms = []
    words = targets.split()
    if sum("re:" in word for word in words) > MAX_PATTERNS:
        errors.add(f"more than {MAX_PATTERNS} regular expressions")
        return []
    for text in words:
        excludes = text.startswith("-")
        rest = text.removeprefix("-")
        word = rest.removeprefix("in:")
        try:
            terms.append(TargetTerm(text, word, _matcher(word), at_input=word != rest, excludes=excludes))
        except TargetError as error:
            errors.add(str(error))
    if not words:
        errors.add(f"targets is empty; write roles, paths or all-linear. This model has {_inventory(sites)}")
    elif all(word.startswith("-") for word in words):
        errors.add(f"there are only exclusions, and nothing to leave them out of; write 'all-linear {targets.strip()}'")
    return sorted(terms, key=lambda term: term.excludes)


def _matching_sites(term: TargetTerm, sites: Sequence[Site], selected: Collection[Site]) -> list[Site]:
    """A path means modules, and what is no leaf module (a sublayer, a block) only where no module has such a path.

    A glob or regular expression never selects the latter, and leaves them out with everything else of such a path.
    selected: what an exclusion can leave out; a path of a sublayer that is not among it is most likely a mistake.
    """
    matching = [site for site in sites if term.matches(site)]
    if _is_role(term.word):
        return matching
    modules = [site for site in matching if site.role not in COMPOSITE_ROLES]
    if not term.excludes:
        return modules if names_a_group(term.word) else modules or matching
    keys = {(site.path, site.role) for site in selected}
    composites = [s for s in matching if s.role in COMPOSITE_ROLES and (s.path, s.role) in keys]
    return [*modules, *composites] if names_a_group(term.word) else modules or composites


def _without(selected: Sequence[Site], excluded: Sequence[tuple[TargetTerm, Site]], errors: Errors) -> list[Site]:
    """The selected sites that no exclusion means. A module takes its parts and its input along."""
    by_path: dict[str, list[tuple[TargetTerm, Site]]] = {}
    for term, site in excluded:
        by_path.setdefault(site.path, []).append((term, site))
    remaining = []
    for site in selected:
        whole, part = False, None  # the exclusion that names a part of it
        for term, other in by_path.get(site.path, ()):
            same_role = other.role == site.role
            if (term.at_input and site.port != "in") or (
                not same_role and not {other.role, site.role}.isdisjoint(COMPOSITE_ROLES)
            ):
                continue
            if other.channels in (None, site.channels) or (same_role and site.port == "in"):
                whole = True
            elif site.channels is None and site.port != "in":
                part = term
        if not whole:
            remaining.append(site)
            if part is not None:
                errors.add(f"{part.text!r} is a part of {site.path}, which is selected whole; name its other parts")
    return remaining


def matches(site: Site, word: str) -> bool:
    """True if one word of the language selects this site or the whole module it is a part of: for settings by role."""
    return _matcher(word)(site.replace(channels=None))


def last_match(site: Site, words: tuple[str, ...]) -> str | None:
    """The last of these words that `matches` the site; None where none does. Many paths cost no more than a few."""
    paths, others = _paths_and_others(words)
    steps = site.path.split(".")
    indices = [paths[end] for i in range(len(steps)) if (end := ".".join(steps[i:])) in paths]
    last = max(indices, default=-1)
    for i, word in reversed(others):
        if i < last:
            break
        if matches(site, word):
            return word
    return words[last] if last >= 0 else None


@lru_cache(maxsize=64)
def _paths_and_others(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """The words that are plain paths and the rest, each with its position."""
    paths: dict[str, int] = {}
    others = []
    for i, word in enumerate(words):
        if word == "all-linear" or _is_role(word) or not re.fullmatch(r"[\w.-]+", word):
            others.append((i, word))
        else:
            paths[word] = i
    return paths, others


def named_matches(sites: Sequence[Site], targets: str) -> dict[str, list[Site]]:
    """Word -> the sites it selects, for the words that name modules: by path or by a plain name, not by a pattern."""
    words = (word.removeprefix("in:") for word in targets.split())
    named = [w for w in words if w != "all-linear" and not _is_role(w) and re.fullmatch(r"\w[\w.]*", w)]
    return {word: [site for site in sites if _matcher(word)(site)] for word in named}


def names_a_group(word: str) -> bool:
    """One word stands for sites of several kinds: all-linear, mlp.*, a glob, a regular expression."""
    word = word.removeprefix("in:")
    return word == "all-linear" or word.startswith("re:") or _has_wildcard(word)


def word_for(path: str) -> str:
    """A word that selects the module at this path, also where the path reads like a role ("head", "norm")."""
    return path if path and not _is_role(path) else f"re:{re.escape(path)}"


def _has_wildcard(word: str) -> bool:
    return any(c in word for c in "*?[")


@lru_cache(maxsize=1024)
def _matcher(word: str) -> Callable[[Site], bool]:
    """The test on sites that one word (without "-" and "in:") stands for."""
    if word == "all-linear":
        return lambda s: (
            s.kind == "linear"
            and s.layer is not None
            and s.channels is None
            and s.role not in COMPOSITE_ROLES
            and not s.is_router
        )
    if word.startswith("re:"):
        pattern = PathPattern(word.removeprefix("re:"))
        return lambda s: s.channels is None and bool(pattern.matches(s.path))
    if _is_role(word):
        roles, has_star = _roles_of(word) if "." in word else {word}, "*" in word
        return lambda s: s.role in roles and not (has_star and s.channels is not None)
    return lambda s: s.channels is None and (fnmatchcase(s.path, word) or fnmatchcase(s.path, f"*.{word}"))


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
    word = term.word
    counts = Counter(site.role for site in sites)
    group, _, part = word.partition(".")
    if word.startswith("re:"):
        longest = max((site.path for site in sites), key=len, default="")
        return f"{term.text!r} matches no module; a pattern has to match a whole path, such as {longest!r}"
    if _is_role(word) and part in ("q", "k", "v"):
        fused = [role for role in _roles_of(f"{group}.qkv") if counts[role]]
        if fused:
            is_probed = any(site.batch_relation != "unknown" for site in sites)
            hint = (
                ", or attach with an example batch so that the channels are found: "
                "kitout.attach(model, example_batch=batch)"
            )
            return (
                f"{term.text!r} matches no site: this model fuses its projections ({counts[fused[0]]} x {fused[0]}) "
                f"and their channels are not known. Write {fused[0]!r} for the whole projection"
                f"{'' if is_probed else hint}"
            )
    if _is_regex_of(word, sites):
        return f"{term.text!r} matches no path or glob; as a regular expression write {f're:{word}'!r}"
    if "," in word:
        return f"{term.text!r} matches no site: targets are separated by spaces, {' '.join(word.split(','))!r}"
    if _is_role(word) or re.fullmatch(rf"({'|'.join(GROUPS)})\.\w+", word):
        return f"{term.text!r} matches no site; this model has {_inventory(sites)}. {suggest(word, sorted(counts))}"
    if not _has_wildcard(word) and any(f".{word}." in f".{site.path}." for site in sites):
        inside = f"{term.text.removesuffix(word)}{word}.*"
        return f"{term.text!r} is a module that holds others: {inside!r} means all inside it"
    linear = ["all-linear"] if any(map(_matcher("all-linear"), sites)) else []
    ends = [".".join(site.path.split(".")[-n:]) for n in (1, 2) for site in sites]
    names = dict.fromkeys(end for end in ends if not end[:1].isdigit())
    return (
        f"{term.text!r} is not a role and matches no module path; {suggest(word, [*linear, *names, *counts])}. "
        f"Roles of this model: {_inventory(sites)}"
    )


def _is_regex_of(word: str, sites: Sequence[Site]) -> bool:
    try:
        return any(map(_matcher(f"re:{word}"), sites))
    except TargetError:
        return False


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
