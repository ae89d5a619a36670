"""prove_sites: one tiny forward shows what each projection feeds, where sublayers end, which modules run.

Gradients of captured q, k, v with respect to a projection's output are non-zero exactly on the channels that feed
them. A second forward with one more row shows how each site's first dimension follows the batch. RNG, modes and
requires_grad are restored. It knows no architecture; where the forward cannot be run, the survey stays unproven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.attention_sites import kv_sites
from kitout.base.probe.cached_steps import keeps_state, readers_in_cached_steps
from kitout.base.probe.chosen_experts import trace_choice
from kitout.base.probe.dummy_batch import dummy_batch, num_rows, with_more_rows
from kitout.base.probe.media_modules import media_modules
from kitout.base.probe.read_weights import read_by_another
from kitout.base.probe.row_limits import padding_leaks, undivided
from kitout.base.probe.shape_tracer import ShapeTracer
from kitout.base.probe.stack_inputs import complete_towers
from kitout.base.probe.sublayers import sublayer_sites
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.site import BatchRelation, Site
from kitout.base.survey import Survey
from kitout.errors import ConfigError

PROJECTIONS = ("attn.", "cross.", "mlp.")


def prove_sites(survey: Survey, example_batch: Mapping[str, Any] | None = None) -> Survey:
    """The survey with all fields that a forward shows: batch relations, channels, sublayers, attentions, unused sites.

    example_batch: keyword arguments of one forward. If it fails, its error is raised. If the dummy batch that stands in
    for it fails, the reason is in `unproven_reason`.
    """
    model = survey.model
    if example_batch is not None and not isinstance(example_batch, Mapping):
        raise ConfigError(
            f"example_batch is a dict of the model's keyword arguments, found {type(example_batch).__name__}"
        )
    survey = replace(survey, media=media_modules(survey))
    batch = dict(example_batch) if example_batch is not None else dummy_batch(model, 2)
    if batch is None:
        return replace(survey, unproven_reason="no dummy batch can be built for this model")
    try:
        with eval_mode(model, grad=True, freeze=True):
            tracer = _trace_forward(survey, batch)
            wider_batch, more_rows = with_more_rows(batch)
            rows = num_rows(batch), more_rows
            wider = _trace_more_rows(survey, wider_batch)
            choice = trace_choice(survey, batch, tracer, wider, _trace_shapes)
            cached_readers = readers_in_cached_steps(survey, batch)
            channels = _channels_by_operand(tracer)
            towers = complete_towers(survey, tracer)
            relations = _relations(survey, tracer, wider, batch, rows) | choice.relations
            towers = [
                replace(t, padding_leaks=padding_leaks(survey, t, batch, tracer.streams))
                if t.embedder is not None and not t.causal
                else t
                for t in towers
            ]
    except Exception as error:
        if example_batch is not None:
            raise
        return replace(survey, unproven_reason=f"a dummy batch failed: {type(error).__name__}: {str(error)[:200]}")
    sites = [s.replace(batch_relation=relations.get(s.path, "unknown")) for s in survey.sites]
    sites = [_with_layout(s, tracer.output_shapes.get(s.path)) for s in sites]
    sites = [read_by_another(s, tracer, wider, partial(_batch_relation, rows=rows), cached_readers) for s in sites]
    states = {r for readers in cached_readers.values() for r in readers if keeps_state(model.get_submodule(r))}
    sites = [s.replace(batch_relation="none") if s.reader in states else s for s in sites]
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
        shared_inputs=tuple(_shared_inputs(sites, tracer)),
        execution_order=tuple(tracer.call_counts),
        kv_sites=tuple(attentions),
        kv_refusals=kv_refusals,
        biased_attentions=frozenset(call.path for call in tracer.attention_calls if call.has_mask_bias),
        unproven_reason="",
    )


def _shared_inputs(sites: list[Site], tracer: ForwardTracer) -> Iterator[tuple[str, ...]]:
    """Linears that belong to one module and take the very same tensor, call by call."""
    linears = {s.path for s in sites if s.kind == "linear" and s.layer is not None}
    groups: dict[Any, list[str]] = {}
    for path in tracer.call_counts:
        if path in linears and (arguments := tracer.arguments.get(path)):
            groups.setdefault((path.rpartition(".")[0], *arguments), []).append(path)
    return (tuple(paths) for paths in groups.values() if len(paths) > 1)


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
    blocks = [b.path for b in survey.blocks if b.is_one_module]
    leaves = [s.path for s in survey.sites if s.reader is None]
    tracer = ForwardTracer(survey.model, projections, blocks, leaves=leaves, inputs=batch.values())
    with tracer:
        survey.model(**batch)
    return tracer


def _trace_shapes(survey: Survey, batch: Mapping[str, Any]) -> ShapeTracer:
    projections = [s.path for s in survey.sites if s.role.startswith(PROJECTIONS) and s.port == "out"]
    blocks = [b.path for b in survey.blocks if b.is_one_module]
    leaves = [s.path for s in survey.sites if s.reader is None]
    has_choice = bool(survey.alternatives or survey.fused_experts)  # then values decide which modules run
    tracer = ShapeTracer(survey.model, blocks, [*projections, *leaves], skips_products=not has_choice)
    with tracer:
        survey.model(**batch)
    return tracer


def _trace_more_rows(survey: Survey, batch: Mapping[str, Any]) -> ShapeTracer:
    try:
        return _trace_shapes(survey, batch)
    except Exception as error:
        raise ConfigError(
            "the model runs on this batch, and not with its rows repeated "
            f"({type(error).__name__}: {str(error)[:200]}): give an example_batch of one or more whole rows, all "
            "values of one row after those of the row before"
        ) from error


def _relations(
    survey: Survey, tracer: ForwardTracer, wider: ShapeTracer, batch: Mapping[str, Any], rows: tuple[int, int]
) -> dict[str, BatchRelation]:
    """How dim 0 follows the batch, by path. rows: of the two forwards."""
    dims = tracer.first_dims
    relations = {path: _batch_relation((dim, wider.first_dims.get(path, 0)), rows) for path, dim in dims.items()}
    once = [s.path for s in survey.sites if s.kind != "embedding" and relations.get(s.path) == "one"]
    return relations | dict.fromkeys(undivided(survey, once, batch, tracer.streams), "none")


def _batch_relation(dims: tuple[int, int], rows: tuple[int, int]) -> BatchRelation:
    """dims: dim 0 at the site for batches of so many rows."""
    if dims == rows:
        return "batch"
    if dims == (1, 1):
        return "one"
    return "multiple" if dims[0] * rows[1] == dims[1] * rows[0] else "none"


def _with_layout(site: Site, shape: torch.Size | None) -> Site:
    """A norm or convolution with the layout that its output has shown: some classes move channels themselves."""
    if site.kind not in ("norm", "conv") or shape is None or len(shape) < 3:
        return site
    is_first = shape[1] == site.d_out
    if is_first == (shape[-1] == site.d_out) or is_first == site.channels_first:
        return site  # both axes have this width, or it is as the class says
    return site.replace(channels_first=is_first, kind="norm" if site.kind == "norm" else "other")


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
    if t.device.type == "meta" or not t.requires_grad:  # some models run a part of their blocks without gradients
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
