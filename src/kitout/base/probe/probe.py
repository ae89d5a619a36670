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
from kitout.base.probe.attention_sites import attentions
from kitout.base.probe.dummy_batch import example as make_example
from kitout.base.probe.dummy_batch import one_more
from kitout.base.probe.stack_inputs import towers
from kitout.base.probe.sublayers import sublayers
from kitout.base.probe.tracer import Watch
from kitout.base.site import Rows, Site
from kitout.base.survey import Survey

PROJECTIONS = ("attn.", "cross.", "mlp.")


def prove(found: Survey, example: Mapping[str, Any] | None = None) -> Survey:
    """The survey with rows, channel sites, sublayer sites and silent sites filled in, as far as a forward shows them.

    example: keyword arguments of one forward. A given example that fails raises; a made-up one that fails leaves the
    reason in `doubt`.
    """
    model = found.model
    batch = dict(example) if example is not None else make_example(model, 2)
    if batch is None:
        return replace(found, doubt="no example batch could be made up for this model")
    try:
        with eval_mode(model, grad=True, freeze=True):
            first = _watch(found, batch)
            second = _watch(found, one_more(batch))
            feeds = _feeds(first)
            seen = towers(found, found.sites, first)
    except Exception as error:
        if example is not None:
            raise
        return replace(found, doubt=f"a made-up batch failed: {type(error).__name__}: {str(error)[:200]}")
    rows = {p: _rows(first.rows[p], second.rows.get(p, 0), batch) for p in first.rows}
    sites = [s.at(rows=rows.get(s.path, "unknown")) for s in found.sites]
    sites = _with_parts(sites, feeds)
    open_, closed = attentions(found, sites, first)
    sites += [s.at(rows=rows.get(s.path, "unknown")) for s in sublayers(found, first)]
    sites = [s for s in sites if s.path in first.fired or not _spoken_for(s, sites, first)]
    silent = frozenset(s.path for s in sites if s.path not in first.fired)
    unread = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in first.read)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites.sort(key=lambda s: order[s.path])  # stable: a whole before its parts
    return replace(
        found,
        sites=tuple(sites),
        towers=tuple(seen),
        proven=True,
        silent=silent,
        unread=unread,
        order=tuple(first.fired),
        attentions=tuple(open_),
        closed=closed,
        doubt="",
    )


def _spoken_for(site: Site, sites: list[Site], watch: Watch) -> bool:
    """True for a module that never runs because others that hold its very parameters do (T5's shared table)."""
    own = {id(p) for p in site.module.parameters()}
    others = (p for s in sites if s.path in watch.fired for p in s.module.parameters(recurse=False))
    return own <= {id(p) for p in others}


def _watch(found: Survey, batch: Mapping[str, Any]) -> Watch:
    cut = [s.path for s in found.sites if s.role.startswith(PROJECTIONS)]
    watch = Watch(found.model, cut, [b.path for b in found.blocks if b.whole])
    with watch:
        found.model(**batch)
    return watch


def _rows(first: int, second: int, batch: Mapping[str, Any]) -> Rows:
    """first and second: dim 0 at the site for a batch of n and of n + 1 rows."""
    n = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1)
    if (first, second) == (n, n + 1):
        return "batch"
    if first == second == 1:
        return "one"
    if first * (n + 1) == second * n:
        return "major"
    return "none"


def _feeds(watch: Watch) -> dict[str, dict[str, tuple[int, ...]]]:
    """By projection and letter, the output channels that reach that operand of attention ((): all or unknown)."""
    feeds: dict[str, dict[str, tuple[int, ...]]] = {}
    for call in watch.attentions:
        for letter, leaves in call.leaves.items():
            for path in leaves:
                if not path.startswith("stream:") and letter not in feeds.setdefault(path, {}):
                    feeds[path][letter] = _channels(call.tensors[letter], watch.leaf[path][-1])
    return feeds


def _channels(t: Tensor, leaf: Tensor) -> tuple[int, ...]:
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


def _with_parts(sites: list[Site], feeds: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Site]:
    """Labels put right by what was seen, and one more site per part of a projection that feeds several letters."""
    result = []
    for site in sites:
        seen = feeds.get(site.path, {})
        kind, _, letter = site.role.partition(".")
        if kind not in ("attn", "cross") or letter == "o" or not seen:
            result.append(site)
        elif len(seen) == 1:
            result.append(site.at(role=f"{kind}.{next(iter(seen))}"))
        else:
            result.append(site.at(role=f"{kind}.qkv"))
            for part, channels in sorted(seen.items(), key=lambda item: "qkv".index(item[0])):
                if channels and len(channels) < site.d_out:
                    result.append(site.at(role=f"{kind}.{part}", channels=channels, d_out=len(channels)))
    return result
