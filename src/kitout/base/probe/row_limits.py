"""What rows of one batch cannot have of their own, shown by tiny forwards with one thing changed.

Two questions: may a module that answers once for all rows answer for each, and does padding leave a text alone? Each is
asked only where a model gives reason to. It knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.probe.dummy_batch import num_rows
from kitout.base.survey import Survey, Tower

TOLERANCE, ROUNDINGS = 1e-4, 8  # of the largest value, or so many roundings of a coarser dtype
PADDING = 2  # columns


def undivided(
    survey: Survey, paths: Iterable[str], batch: Mapping[str, Any], streams: Mapping[str, Tensor]
) -> set[str]:
    """Those of the modules, which answer once for all rows, whose answer the model cannot take for each row.

    A position table that is added to the stream can have a value for every row; one that is folded into heads, or
    repeated for the rows afterwards, cannot. Modules of one name are tried together. streams: what blocks gave in a
    forward of the batch.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[2], []).append(path)
    if not groups:
        return set()
    rows = num_rows(batch)

    def expand(_module: nn.Module, _args: Any, out: Any) -> Any:
        return out.expand(rows, *out.shape[1:]) if isinstance(out, Tensor) and out.shape[:1] == (1,) else None

    last = _last_blocks(survey, survey.towers)
    result: set[str] = set()
    for group in groups.values():
        if not _same(streams, partial(_run, survey, batch, last, dict.fromkeys(group, expand))):
            result.update(group)
    return result


def padding_leaks(survey: Survey, tower: Tower, batch: Mapping[str, Any], streams: Mapping[str, Tensor]) -> bool:
    """Whether a text of this stack changes where masked columns of zeros are put behind it."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or not tower.token_embedding:
        return False
    width = ids.shape[1]
    wide = {k: _pad(v, ids) for k, v in batch.items()}
    wide["attention_mask"] = _pad(torch.ones_like(ids), ids)

    def blank(_module: nn.Module, _args: Any, out: Any) -> Any:
        return torch.cat((out[:, :width], torch.zeros_like(out[:, width:])), 1)

    last = _last_blocks(survey, (tower,))
    return not _same(streams, partial(_run, survey, wide, last, {tower.token_embedding: blank}, width))


def _pad(value: Any, ids: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != ids.shape or value.is_floating_point():
        return value
    return torch.cat((value, value.new_zeros(len(value), PADDING)), 1)


def _last_blocks(survey: Survey, towers: Iterable[Tower]) -> list[str]:
    return [path for t in towers for path in [b.path for b in survey.blocks if b.tower == t.path][-1:]]


def _run(
    survey: Survey, batch: Mapping[str, Any], blocks: Iterable[str], hooks: Mapping[str, Callable[..., Any]],
    width: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What the blocks give in one forward under the hooks, in the first columns."""
    streams: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, _args: Any, out: Any) -> None:
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, Tensor):
            streams[path] = first if width is None else first[:, :width]

    module = survey.model.get_submodule
    with ExitStack() as stack, torch.no_grad():
        for path, hook in hooks.items():
            stack.callback(module(path).register_forward_hook(hook).remove)
        for path in blocks:
            stack.callback(module(path).register_forward_hook(partial(keep, path)).remove)
        survey.model(**batch)
    return streams


def _same(expected: Mapping[str, Tensor], run: Callable[[], Mapping[str, Tensor]]) -> bool:
    try:
        found = run()
    except Exception:
        return False
    return all(_is_close(stream, expected.get(path)) for path, stream in found.items())


def _is_close(found: Tensor, expected: Tensor | None) -> bool:
    if expected is None or found.shape != expected.shape:
        return False
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(found.dtype).eps)
    return found.is_meta or bool((found - expected).abs().max() <= tolerance * expected.abs().max())
