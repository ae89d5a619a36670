"""prove_sites: one tiny forward shows what each projection feeds, where sublayers end, which modules run.

Gradients of captured q, k, v with respect to a projection's output are non-zero exactly on the channels that feed
them. A second forward with one more row shows how each site's first dimension follows the batch. RNG, modes and
requires_grad are restored. It knows no architecture; where the forward cannot be run, the survey stays unproven.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.attention_sites import kv_sites
from kitout.base.probe.chosen_experts import trace_choice
from kitout.base.probe.dummy_batch import dummy_batch, with_extra_row
from kitout.base.probe.read_weights import read_by_another
from kitout.base.probe.stack_inputs import complete_towers
from kitout.base.probe.sublayers import sublayer_sites
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.site import BatchRelation, Site
from kitout.base.survey import Survey

PROJECTIONS = ("attn.", "cross.", "mlp.")


def prove_sites(survey: Survey, example_batch: Mapping[str, Any] | None = None) -> Survey:
    """The survey with all fields that a forward shows: batch relations, channels, sublayers, attentions, unused sites.

    example_batch: keyword arguments of one forward. If it fails, its error is raised. If the dummy batch that stands in
    for it fails, the reason is in `unproven_reason`.
    """
    model = survey.model
    batch = dict(example_batch) if example_batch is not None else dummy_batch(model, 2)
    if batch is None:
        return replace(survey, unproven_reason="no dummy batch can be built for this model")
    try:
        with eval_mode(model, grad=True, freeze=True):
            tracer = _trace_forward(survey, batch)
            wider = _trace_forward(survey, with_extra_row(batch))
            choice = trace_choice(survey, batch, tracer, wider, _trace_forward)
            channels = _channels_by_operand(tracer)
            towers = complete_towers(survey, tracer)
    except Exception as error:
        if example_batch is not None:
            raise
        return replace(survey, unproven_reason=f"a dummy batch failed: {type(error).__name__}: {str(error)[:200]}")
    relations = {
        path: _batch_relation(dim, wider.first_dims.get(path, 0), batch) for path, dim in tracer.first_dims.items()
    }
    relations |= choice.relations
    sites = [s.replace(batch_relation=relations.get(s.path, "unknown")) for s in survey.sites]
    sites = [read_by_another(s, tracer, wider, partial(_batch_relation, batch=batch)) for s in sites]
    sites = _split_fused(sites, channels)
    attentions, kv_refusals = kv_sites(survey, sites, tracer)
    sites += [s.replace(batch_relation=relations.get(s.path, "unknown")) for s in sublayer_sites(survey, tracer)]
    sites = [s for s in sites if s.path in tracer.call_counts or not _parameters_run_elsewhere(s, sites, tracer)]
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites.sort(key=lambda s: order[s.path])  # stable: a fused projection before its parts
    named_parameters = model.named_parameters(remove_duplicate=False)
    return replace(
        survey,
        sites=tuple(sites),
        towers=tuple(towers),
        proven=True,
        unused=frozenset(s.path for s in sites if not _runs(s, tracer) and s.path not in choice.unreached),
        unreached=choice.unreached,
        unread_parameters=frozenset(name for name, p in named_parameters if id(p) not in tracer.read_parameters),
        execution_order=tuple(tracer.call_counts),
        kv_sites=tuple(attentions),
        kv_refusals=kv_refusals,
        unproven_reason="",
    )


def _runs(site: Site, tracer: ForwardTracer) -> bool:
    """Its module ran, or its weight was read by the module that multiplies by it."""
    if site.reader is None:
        return site.path in tracer.call_counts
    return id(site.module._parameters.get(site.weight_name)) in tracer.read_parameters


def _parameters_run_elsewhere(site: Site, sites: list[Site], tracer: ForwardTracer) -> bool:
    """True for a module that never runs because others that hold its very parameters do (T5's shared table)."""
    running = (p for s in sites if s.path in tracer.call_counts for p in s.module.parameters(recurse=False))
    return {id(p) for p in site.module.parameters()} <= {id(p) for p in running}


def _trace_forward(survey: Survey, batch: Mapping[str, Any]) -> ForwardTracer:
    projections = [s.path for s in survey.sites if s.role.startswith(PROJECTIONS) and s.port == "out"]
    tracer = ForwardTracer(survey.model, projections, [b.path for b in survey.blocks if b.is_one_module])
    with tracer:
        survey.model(**batch)
    return tracer


def _batch_relation(first: int, second: int, batch: Mapping[str, Any]) -> BatchRelation:
    """first, second: dim 0 at the site for a batch of n and of n + 1 rows."""
    n = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1)
    if (first, second) == (n, n + 1):
        return "batch"
    if first == second == 1:
        return "one"
    if first * (n + 1) == second * n:
        return "multiple"
    return "none"


def _channels_by_operand(tracer: ForwardTracer) -> dict[str, dict[str, tuple[int, ...]]]:
    """Projection -> operand of attention ("q", "k", "v") -> output channels that reach it; (): all, or unknown."""
    channels: dict[str, dict[str, tuple[int, ...]]] = {}
    for call in tracer.attention_calls:
        for operand, leaves in call.leaves.items():
            for path in leaves:
                if not path.startswith("stream:") and operand not in channels.setdefault(path, {}):
                    channels[path][operand] = _channels_reaching(call.tensors[operand], tracer.leaves[path][-1])
    return channels


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


def _split_fused(sites: list[Site], channels_of: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Site]:
    """Roles corrected by the trace, and one more site per part of a projection that feeds several operands."""
    result = []
    for site in sites:
        operands = channels_of.get(site.path, {})
        kind, _, part = site.role.partition(".")
        if kind not in ("attn", "cross") or part == "o" or not operands:
            result.append(site)
        elif len(operands) == 1:
            result.append(site.replace(role=f"{kind}.{next(iter(operands))}"))
        else:
            result.append(site.replace(role=f"{kind}.qkv"))
            for part, channels in sorted(operands.items(), key=lambda item: "qkv".index(item[0])):
                if channels and len(channels) < site.d_out:
                    result.append(site.replace(role=f"{kind}.{part}", channels=channels, d_out=len(channels)))
    return result
