"""What of a route weights can hold at all, before anything is folded: the entry taken apart, and what is in its way.

It knows adapters and their methods, and neither modules nor how a fold is computed (`fold.py`): what only one module
cannot hold is found there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kitout.base.survey import Survey
from kitout.errors import Errors, NotMergeable
from kitout.route import Average, Mix, RouteEntry, Stack, adapter_names, simplify
from kitout.runtime.adapter import Adapter, conflict_with_head, trained_and_read
from kitout.runtime.routing.expand import averaging_names, expand


def expand_foldable(
    entry: RouteEntry, adapters_by_name: Mapping[str, Adapter], survey: Survey | None
) -> tuple[RouteEntry, list[Adapter]]:
    """The simplified entry with every composition taken apart, and the adapters in it. NotMergeable for an Average."""
    averaging = averaging_names(entry, adapters_by_name)
    if averaging and not isinstance(entry, str):
        raise NotMergeable(
            f"cannot merge {describe(entry)}: {averaging[0]!r} averages whole outputs, which no weights of one model "
            "compute"
        )
    expanded, adapters_by_name = expand(entry, adapters_by_name, survey)
    if isinstance(expanded, Average):
        weights: dict[Any, float] = dict(expanded.parts)
        raise NotMergeable(
            f"{describe(entry)} averages whole outputs, which no weights of one model compute: write a Mix of "
            f"what it averages, {describe(Mix(weights))}"
        )
    assert not isinstance(expanded, tuple)
    entry = simplify(expanded)
    return entry, [adapters_by_name[name] for name in dict.fromkeys(adapter_names(entry))]


def check_foldable(adapters: Sequence[Adapter], errors: Errors) -> None:
    """Adds an error for what no module's weights can hold: parts weighed anew for every input, conflicts, virtual
    tokens, values that are not finite.
    """
    for adapter in adapters:
        if (parts := adapter.method.part_names()) and not adapter.method.mergeable:
            where = f" at {adapter.sites[0].path}" if adapter.sites else ""
            errors.add(
                f"{adapter.name!r} is a {type(adapter.method).__name__}, which weighs its parts anew for every "
                f"input{where}: "
                f"no weights give the same function; write a Mix or a Mixture of {', '.join(map(repr, parts))}"
            )
    if conflict := conflict_with_head(adapters):
        errors.add(conflict)
    if shared := trained_and_read(adapters):
        errors.add(f"{shared} is trained whole by one adapter and changed by another: merge one of them")
    for adapter in adapters:
        for part in [*adapter.prefixes.values(), *(p for each in adapter.prompts.values() for p in each)][:2]:
            errors.add(f"{part.site.path} ({adapter.name}): virtual tokens cannot be merged into weights")
        for name in _non_finite(adapter)[:2]:
            errors.add(f"{adapter.name} holds NaN or infinity in {name}")


def _non_finite(adapter: Adapter) -> list[str]:
    """Names of tensors with a value that is not finite, where a trained copy does not have it from the base."""
    names = []
    for site in adapter.sites:
        delta = adapter.delta(site)
        base = delta.base_tensors(site.module)
        for name, value in [*delta.named_parameters(), *delta.named_buffers()]:
            is_finite = value.isfinite()
            if not is_finite.all() and not (name in base and (is_finite | ~base[name].isfinite()).all()):
                names.append(f"{site.path} {name}")
    if adapter.shared is not None:
        names += [name for name, p in adapter.shared.named_parameters() if not p.isfinite().all()]
    for path, head in adapter.heads.items():
        names += [f"{path.replace('/', '.')} {n}" for n, p in head.named_parameters() if not p.isfinite().all()]
    return names


def describe(entry: RouteEntry) -> str:
    """An entry in words, for messages."""
    if isinstance(entry, Stack):
        return " then ".join(map(describe, entry.parts))
    if isinstance(entry, Mix):
        return "Mix({" + ", ".join(f"{describe(part)}: {weight:g}" for part, weight in entry.parts) + "})"
    return repr(entry)
