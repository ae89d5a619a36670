"""What rows of one batch cannot have of their own, shown by tiny forwards with one thing changed.

Two questions: may a module that answers once for all rows answer for each, and does padding leave a text alone? Each is
asked only where a model gives reason to. It knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.survey import Survey, Tower

TOLERANCE, ROUNDINGS = 1e-4, 8  # of the largest value, or so many roundings of a coarser dtype
PADDING = 2  # columns


def undivided(survey: Survey, paths: Iterable[str], batch: Mapping[str, Any]) -> set[str]:
    """Those of the modules, which answer once for all rows, whose answer the model cannot take for each row.

    A position table that is added to the stream can have a value for every row; one that is folded into heads, or
    repeated for the rows afterwards, cannot. Modules of one name are tried together.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[2], []).append(path)
    if not groups:
        return set()
    rows = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1)

    def expand(_module: nn.Module, _args: Any, out: Any) -> Any:
        return out.expand(rows, *out.shape[1:]) if isinstance(out, Tensor) and out.shape[:1] == (1,) else None

    expected = _last_streams(survey, batch)
    result: set[str] = set()
    for group in groups.values():
        if not _same(expected, partial(_last_streams, survey, batch, dict.fromkeys(group, expand))):
            result.update(group)
    return result


def padding_leaks(survey: Survey, tower: Tower, batch: Mapping[str, Any]) -> bool:
    """Whether a text of this stack changes where masked columns of zeros are put behind it."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or not tower.token_embedding:
        return False
    width = ids.shape[1]
    narrow = {**batch, "attention_mask": torch.ones_like(ids)}
    wide = {k: _pad(v, ids) for k, v in narrow.items()}

    def blank(_module: nn.Module, _args: Any, out: Any) -> Any:
        out = out.clone()
        out[:, width:] = 0
        return out

    expected = _last_streams(survey, narrow, tower=tower)
    return not _same(
        expected, lambda: [t[:, :width] for t in _last_streams(survey, wide, {tower.token_embedding: blank}, tower)]
    )


def _pad(value: Any, ids: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != ids.shape or value.is_floating_point():
        return value
    return torch.cat((value, value.new_zeros(len(value), PADDING)), 1)


def _last_streams(
    survey: Survey, batch: Mapping[str, Any], hooks: Mapping[str, Callable[..., Any]] | None = None,
    tower: Tower | None = None,
) -> list[Tensor]:  # fmt: skip
    """What the last block of each stack (of one) gives in one forward."""
    towers = survey.towers if tower is None else (tower,)
    last = [[b.path for b in survey.blocks if b.tower == t.path][-1:] for t in towers]
    streams: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, Tensor):
            streams.append(first)

    with ExitStack() as stack, torch.no_grad():
        for path, hook in (hooks or {}).items():
            stack.callback(survey.model.get_submodule(path).register_forward_hook(hook).remove)
        for path in [p for paths in last for p in paths]:
            stack.callback(survey.model.get_submodule(path).register_forward_hook(keep).remove)
        survey.model(**batch)
    return streams


def _same(expected: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]) -> bool:
    try:
        found = run()
    except Exception:
        return False
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False
    return all(
        a.is_meta or bool((a - b).abs().max() <= max(TOLERANCE, ROUNDINGS * torch.finfo(a.dtype).eps) * b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )
