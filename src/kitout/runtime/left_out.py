"""What a selection leaves out of a model: sites at which an adapter would have no effect, and why.

A default or a group ("all-linear", "mlp.*") selects what there is: a module that never runs is left out and reported.
It is an error where a word of `targets` names it by path or plain name and selects nothing that runs. This knows
surveys and the Method interface, and nothing of routes or files.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from kitout.base.parametrized import is_computed
from kitout.base.select import named_matches
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import is_plain_float
from kitout.errors import UnusedSite
from kitout.method import Method

NEVER_RUNS = "never runs in this model's forward"


def why_left_out(survey: Survey, method: Method, site: Site) -> str:
    """Why nothing of this method has an effect at this site; "" where it has."""
    if site.path in survey.unused:
        return NEVER_RUNS
    if site.reader is None:
        return ""
    if site.port != "weight":
        return f"has no input of its own: {site.reader} reads its weight"
    if is_computed(site.module, site.weight_name) or is_computed(site.module, site.bias_name):
        return f"is computed of other parameters, and {site.reader} reads its weight"
    if not is_plain_float(site.module, site.weight_name):
        return f"is quantized, and {site.reader} reads its weight"
    reason = method.why_not_at_weight(site)
    return f"has its weight read by {site.reader}, and {reason}" if reason else ""


def leave_out(survey: Survey, method: Method, sites: Sequence[Site], name: str) -> tuple[list[Site], dict[str, str]]:
    """The sites without those where the method has no effect, and path -> why of those.

    UnusedSite where that was all, or all of what one word of `targets` names.
    """
    reasons = {site: reason for site in sites if (reason := why_left_out(survey, method, site))}
    left_out = {site.path: reason for site, reason in reasons.items()}
    if reasons:
        check_named(method, sites, left_out, name)
    return [site for site in sites if site not in reasons], left_out


def check_named(method: Method, sites: Sequence[Site], left_out: Mapping[str, str], name: str) -> None:
    """UnusedSite where all sites are left out, or all that one word of `targets` names by path or plain name."""
    named = named_matches(sites, method.targets or "")
    missing = {p for matching in named.values() for p in _paths(matching) if _paths(matching) <= left_out.keys()}
    if _paths(sites) <= left_out.keys():
        missing = set(left_out)
    if missing:
        listed = "; ".join(f"{path} {left_out[path]}" for path in sorted(missing)[:5])
        raise UnusedSite.of(
            [name],
            f"adapter {name!r}: {listed}: nothing placed there would have an effect; choose other targets (see "
            "print(kit))",
        )


def _paths(sites: Iterable[Site]) -> set[str]:
    return {site.path for site in sites}


def left_out_text(left_out: Mapping[str, str]) -> str:
    """All of it in one line: layers that differ only in their index are shown once."""
    groups: dict[str, Counter[str]] = {}
    for path, reason in left_out.items():
        groups.setdefault(_without_indices(reason), Counter())[_without_indices(path)] += 1
    return "; ".join(
        f"{', '.join(f'{path} x{n}' if n > 1 else path for path, n in list(paths.items())[:6])}"
        f"{', ...' if len(paths) > 6 else ''} ({reason})"
        for reason, paths in groups.items()
    )


def warn_left_out(name: str, left_out: Mapping[str, str], stacklevel: int) -> None:
    """One warning for all that an adapter leaves out; none where there is nothing."""
    if left_out:
        warnings.warn(f"left out of adapter {name!r}: {left_out_text(left_out)}", stacklevel=stacklevel + 1)


def experts_hint(survey: Survey, error: str) -> str:
    """What to write where a selection finds no feed-forward because it is fused experts; "" where that is not why."""
    words = list(dict.fromkeys(re.findall(r"'((?:in:)?mlp\.[a-z*]+)' matches no site", error)))
    if not survey.fused_experts or not words:
        return ""
    roles = dict.fromkeys(s.role for s in survey.sites if s.role in ("attn.k", "attn.v", "attn.qkv"))
    return (
        f"this model's feed-forward is experts fused into parameters ({fused_experts_names(survey)}): no module "
        f"computes what one expert gives, so there is no {' or '.join(words)}. Write targets without it, such as "
        f"targets={' '.join(roles)!r}; only fine-tuning trains the experts"
    )


def fused_experts_text(survey: Survey) -> str:
    """Which parameters hold fused experts and how much of the model they are; "" for a model without any."""
    if not survey.fused_experts:
        return ""
    size = sum(survey.model.get_parameter(name).numel() for name in survey.fused_experts)
    percent = 100 * size / sum(p.numel() for p in survey.model.parameters())
    return (
        f"no adapter reaches the experts: {fused_experts_names(survey)} are fused into parameters, {size:,} values, "
        f"{percent:.1f} % of the model; only fine-tuning trains them"
    )


def fused_experts_names(survey: Survey) -> str:
    """The parameters of fused experts, once for all layers: "mlp.experts.gate_up_proj, down_proj"."""
    names = list(dict.fromkeys(_without_indices(name) for name in survey.fused_experts))
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return ", ".join(
        ", ".join([f"{owner}.{ends[0]}", *ends[1:]])
        for owner in owners
        if (ends := [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == owner])
    )


def _without_indices(path: str) -> str:
    return re.sub(r"(?<![^._])[0-9]+(?![^. ])", "*", path)
