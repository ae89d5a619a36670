"""What `print(kit)` shows: roles x layers x widths x sites, and below them the adapters with their cost. Plain text.

It knows the survey and the adapters' counts, and nothing of routes or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from kitout.base.site import Site
from kitout.format import align_columns
from kitout.route import adapter_names
from kitout.runtime.count import count_parameters, num_base_parameters
from kitout.runtime.left_out import fused_experts_text, left_out_text
from kitout.runtime.state import KitState


def describe_kit(state: KitState) -> str:
    """The whole table."""
    head = f"{type(state.base).__name__}, {num_base_parameters(state.base):,} parameters, frozen"
    if state.merged_names:
        head += f"; {'+'.join(state.merged_names)} merged into it"
    rows = [("role", "layers", "in -> out", "sites"), *site_table(state.survey.sites)]
    experts = fused_experts_text(state.survey)
    lines = [head, *align_columns(rows), *([experts] if experts else []), *adapter_lines(state)]
    if state.survey.unused:
        lines.append(f"never runs in forward: {', '.join(sorted(state.survey.unused)[:8])}")
    return "\n".join(lines)


def site_table(sites: Sequence[Site]) -> list[tuple[str, str, str, str]]:
    """One row per tower, role and width."""
    groups: dict[tuple[str, str, int, int], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.tower, site.role, site.d_in, site.d_out), []).append(site)
    towers = {t for t, *_ in groups}
    rows = []
    for (tower, role, d_in, d_out), members in groups.items():
        name = f"{role}  [{tower}]" if tower and len(towers - {""}) > 1 else role
        rows.append((name, layers_text([s.layer for s in members]), f"{d_in} -> {d_out}", str(len(members))))
    return rows


def layers_text(layers: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'; '-' outside the blocks."""
    numbers = sorted({i for i in layers if i is not None})
    runs: list[list[int]] = []
    for i in numbers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "-"


def adapter_lines(state: KitState) -> list[str]:
    if not state.names:
        return ["no adapters yet: kit.add(name, method)"]
    left_out = {name: left_out_text(state[name].left_out) for name in state.names}
    rows = [("adapter", "method", "trainable", "of base", "sites")]
    for name in state.names:
        adapter = state[name]
        cost = count_parameters(adapter, state.base)
        settings = ", ".join(f"{k}={v!r}" for k, v in adapter.method.non_default_settings().items())
        mark = "* " if name in adapter_names(state.route) else "  "
        text = f"{type(adapter.method).__name__}({settings})"
        rows.append((mark + name, text, f"{cost.trainable:,}", f"{cost.percent:.3f} %", str(len(adapter.sites))))
    notes = [f"  {name}: {note}" for name in state.names for note in state[name].method.notes(state[name].sites)]
    notes += [f"left out of {name!r}: {text}" for name, text in left_out.items() if text]
    return [*align_columns(rows), *notes]
