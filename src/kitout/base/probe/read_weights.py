"""Weights that are multiplied by another module than their own: found by who read them in a traced forward.

A linear or convolution whose forward is never called may work all the same: the module around it reads its weight
(`F.linear(x, self.proj.weight)`, a fused scan, torch's functional attention). Such a site acts at the port "weight". It
knows paths and traces, no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kitout.base.probe.shape_tracer import ShapeTracer
from kitout.base.probe.tracer import ForwardTracer
from kitout.base.site import BatchRelation, Site


def read_by_another(
    site: Site,
    tracer: ForwardTracer,
    wider: ShapeTracer,
    relate: Callable[[tuple[int, int]], BatchRelation],
    cached_readers: Mapping[str, set[str]],
) -> Site:
    """The site, at the port "weight" if one module around it reads its weight and its own forward never runs.

    relate: dim 0 of a value for a batch and for one of more rows -> how it relates to the batch. cached_readers: by
    path, who reads the weight in a step behind a cache, also where the site's own forward runs otherwise.
    """
    if site.reader is None:
        weight = site.module._parameters.get("weight")
        readers = tracer.readers.get(id(weight), set()) if weight is not None else set()
        is_called = site.path in tracer.call_counts
        if is_called:
            readers = cached_readers.get(site.path, set())
        if site.kind not in ("linear", "conv") or len(readers) != 1:
            return site
        (reader,) = readers
        if not reader or not site.path.startswith(f"{reader}."):
            return site
        b = site.module._parameters.get("bias")
        site = site.replace(port="weight", reader=reader, bias_name="bias" if id(b) in tracer.read_parameters else "")
    assert site.reader is not None
    first, second = (_dim(t.output_shapes.get(site.reader, ()), site.batch_axis) for t in (tracer, wider))
    return site.replace(batch_relation=relate((first, second)) if first else "unknown")


def _dim(shape: Sequence[int], axis: int) -> int:
    return shape[axis] if axis < len(shape) else 0
