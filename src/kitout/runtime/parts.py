"""The parts of a composition: the adapters of the same kit that it is made of, checked before it is built.

It knows the Method interface and a kit's adapters, and nothing of how parts are combined.
"""

from __future__ import annotations

from kitout.base.site import Site
from kitout.errors import Errors, RouteError, suggest
from kitout.method import Method
from kitout.runtime.head import Head
from kitout.runtime.state import KitState

TOKEN_PORTS = ("kv", "tokens")


def check_parts(state: KitState, name: str, method: Method) -> None:
    """RouteError that names every part that is missing, merged or the composition itself, or has tokens it may not."""
    errors = Errors(RouteError, f"adapter {name!r}")
    merged = state.names_with_parts(state.merged_names)
    for part in method.part_names():
        if part == name:
            errors.add(f"{part!r} cannot be a part of itself: choose another name for one of them")
        elif part not in state:
            errors.add(f"its part {part!r} is no adapter of this kit: {suggest(part, state.names)}")
        elif part in merged:
            errors.add(f"its part {part!r} is merged into the base: unmerge() first")
        elif not method.parts_may_have_tokens:
            inner = state.names_with_parts([part])
            having = [n for n in inner if any(site.port in TOKEN_PORTS for site in state[n].sites)]
            if having:
                reason = f"{', '.join(map(repr, having))} {'has' if len(having) == 1 else 'have'} virtual tokens"
                errors.add(f"{reason}, which add no value that {type(method).__name__} could weigh; use Composition")
    errors.raise_if_any()


def sites_of_part(state: KitState, name: str) -> list[Site]:
    """Where a part acts, heads included: a route under a name acts where its own parts do."""
    adapter = state[name]
    inner = adapter.method.part_names() if adapter.method.fixed_route() is not None else ()
    heads = [p.site for m in adapter.by_module.values() for p in m.on_output if isinstance(p.delta, Head)]
    return [*adapter.sites, *heads, *(site for part in inner for site in sites_of_part(state, part))]
