"""The proof behind the labels: one tiny forward shows what each projection feeds, where sublayers end, what fires.

Gradients of captured q, k, v with respect to a projection's output are non-zero exactly on the channels that feed
them. A second forward with one row more shows how each site's first dimension follows the batch. Leaves RNG, modes and
requires_grad as they were. It knows no architecture; where the forward cannot be run, the survey stays unproven.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.attention_sites import kv_sites
from kitout.base.probe.dummy_batch import dummy_batch as make_example
from kitout.base.probe.dummy_batch import with_extra_row
from kitout.base.probe.stack_inputs import complete_towers
from kitout.base.probe.sublayers import sublayer_sites
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.site import BatchRelation, Site
from kitout.base.survey import Survey

PROJECTIONS = ("attn.", "cross.", "mlp.")


def prove_sites(survey: Survey, example_batch: Mapping[str, Any] | None = None) -> Survey:
    """The survey with rows, channel sites, sublayer sites and silent sites filled in, as far as a forward shows them.

    example: keyword arguments of one forward. A given example that fails raises; a made-up one that fails leaves the
    reason in `doubt`.
    """
    model = survey.model
    batch = dict(example_batch) if example_batch is not None else make_example(model, 2)
    if batch is None:
        return replace(survey, unproven_reason="no example batch could be made up for this model")
    try:
        with eval_mode(model, grad=True, freeze=True):
            first = _trace_forward(survey, batch)
            second = _trace_forward(survey, with_extra_row(batch))
            feeds = _channels_by_operand(first)
            seen = complete_towers(survey, survey.sites, first)
    except Exception as error:
        if example_batch is not None:
            raise
        return replace(survey, unproven_reason=f"a made-up batch failed: {type(error).__name__}: {str(error)[:200]}")
    rows = {p: _batch_relation(first.first_dims[p], second.first_dims.get(p, 0), batch) for p in first.first_dims}
    sites = [s.replace(batch_relation=rows.get(s.path, "unknown")) for s in survey.sites]
    sites = _split_fused(sites, feeds)
    open_, closed = kv_sites(survey, sites, first)
    sites += [s.replace(batch_relation=rows.get(s.path, "unknown")) for s in sublayer_sites(survey, first)]
    sites = [s for s in sites if s.path in first.call_counts or not _parameters_run_elsewhere(s, sites, first)]
    silent = frozenset(s.path for s in sites if s.path not in first.call_counts)
    unread = frozenset(
        n for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in first.read_parameters
    )
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites.sort(key=lambda s: order[s.path])  # stable: a whole before its parts
    return replace(
        survey,
        sites=tuple(sites),
        towers=tuple(seen),
        proven=True,
        unused=silent,
        unread_parameters=unread,
        execution_order=tuple(first.call_counts),
        kv_sites=tuple(open_),
        kv_refusals=closed,
        unproven_reason="",
    )


def _parameters_run_elsewhere(site: Site, sites: list[Site], tracer: ForwardTracer) -> bool:
    """True for a module that never runs because others that hold its very parameters do (T5's shared table)."""
    own = {id(p) for p in site.module.parameters()}
    others = (p for s in sites if s.path in tracer.call_counts for p in s.module.parameters(recurse=False))
    return own <= {id(p) for p in others}


def _trace_forward(survey: Survey, batch: Mapping[str, Any]) -> ForwardTracer:
    cut = [s.path for s in survey.sites if s.role.startswith(PROJECTIONS)]
    watch = ForwardTracer(survey.model, cut, [b.path for b in survey.blocks if b.is_one_module])
    with watch:
        survey.model(**batch)
    return watch


def _batch_relation(first: int, second: int, batch: Mapping[str, Any]) -> BatchRelation:
    """first and second: dim 0 at the site for a batch of n and of n + 1 rows."""
    n = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1)
    if (first, second) == (n, n + 1):
        return "batch"
    if first == second == 1:
        return "one"
    if first * (n + 1) == second * n:
        return "multiple"
    return "none"


def _channels_by_operand(tracer: ForwardTracer) -> dict[str, dict[str, tuple[int, ...]]]:
    """By projection and letter, the output channels that reach that operand of attention ((): all or unknown)."""
    feeds: dict[str, dict[str, tuple[int, ...]]] = {}
    for call in tracer.attention_calls:
        for letter, leaves in call.leaves.items():
            for path in leaves:
                if not path.startswith("stream:") and letter not in feeds.setdefault(path, {}):
                    feeds[path][letter] = _channels_reaching(call.tensors[letter], tracer.leaves[path][-1])
    return feeds


def _channels_reaching(t: Tensor, leaf: Tensor) -> tuple[int, ...]:
    """Output channels of `leaf` that a random functional of t depends on."""
    if t.device.type == "meta":
        return ()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(t.shape, generator=generator).to(t)
    (grad,) = torch.autograd.grad((t * weight).sum(), leaf, retain_graph=True, allow_unused=True)
    if grad is None:
        return ()
    used = grad.reshape(-1, grad.shape[-1]).ne(0).any(0)
    return tuple(used.nonzero().flatten().tolist())


def _split_fused(sites: list[Site], feeds: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Site]:
    """Labels put right by what was seen, and one more site per part of a projection that feeds several letters."""
    result = []
    for site in sites:
        seen = feeds.get(site.path, {})
        kind, _, letter = site.role.partition(".")
        if kind not in ("attn", "cross") or letter == "o" or not seen:
            result.append(site)
        elif len(seen) == 1:
            result.append(site.replace(role=f"{kind}.{next(iter(seen))}"))
        else:
            result.append(site.replace(role=f"{kind}.qkv"))
            for part, channels in sorted(seen.items(), key=lambda item: "qkv".index(item[0])):
                if channels and len(channels) < site.d_out:
                    result.append(site.replace(role=f"{kind}.{part}", channels=channels, d_out=len(channels)))
    return result
