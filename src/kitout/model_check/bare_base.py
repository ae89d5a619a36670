"""BareBase: what the base does without adapters, measured first, so that no law asks for more than the base keeps.

Which outputs are finite and which rows are independent of each other, which padding it runs with, whether it can be
called token by token, and what rounding alone differs by. It knows no adapter.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import ConfigError
from kitout.model_check.inputs import (
    CheckBatch,
    Values,
    difference,
    outputs_of,
    padded_batch,
    plain_batch,
    row_of,
)

# As a share of the largest value. The products of a forward are rounded a few hundred times in a row.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
NOISE_FACTOR = 10  # what an adapter's rounding may be, as a multiple of the base's own
UNRELATED = 1e-3  # more than rounding: the two are not the same computation
NEW_TOKENS = 3

Stepwise = Callable[[nn.Module, CheckBatch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BareBase:
    """The base's own behavior on the batches of one check."""

    plain: CheckBatch
    """Three rows without padding."""
    values: Values
    """The base's outputs there."""
    fields: tuple[str, ...]
    """Names of the outputs that are finite."""
    tolerance: float
    """What rounding may differ by in this model's dtype."""
    row_batches: tuple[tuple[str, CheckBatch, dict[str, float]], ...]
    """(kind of padding, batch, output -> how far a row alone is from that row in the batch)."""
    rows_reason: str = ""
    """Why rows cannot be compared, where no output of a row is independent of the other rows."""
    cached: Mapping[str, tuple[Stepwise, CheckBatch, float]] = field(default_factory=dict)
    """Way of calling -> (cached and uncached logits, its batch, how far the base's are apart)."""
    cache_reason: str = ""
    """Why cached calls cannot be compared."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What it allows to compare."""
        padding = " and ".join(f"{kind} padding" for kind, *_ in self.row_batches if kind)
        rows = self.rows_reason or f"compared with {padding or 'no padding'}"
        cache = self.cache_reason or f"compared by {', '.join(self.cached)}"
        return f"rows: {rows}", f"cache: {cache}"


@torch.no_grad()
def measure_base(model: nn.Module, example_batch: Mapping[str, Any] | None) -> BareBase:
    """Runs the base on its own. ConfigError where it does not run, or where nothing it gives is finite."""
    plain = plain_batch(model, example_batch)
    try:
        values = outputs_of(model, plain)
    except Exception as error:
        advice = "give a batch as the model takes it, example_batch=..." if example_batch is None else "correct it"
        raise ConfigError(
            f"the base itself does not run on the {'made-up' if example_batch is None else 'example'} batch, {advice}: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    fields = tuple(name for name, value in values.items() if value.numel() and bool(value.isfinite().all()))
    if not fields:
        raise ConfigError(f"the base itself gives no finite output: {', '.join(values) or 'no floating tensor'}")
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    tolerance = max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in dtypes)
    repeated = outputs_of(model, plain)  # kernels that add in another order each time
    tolerance = max(tolerance, NOISE_FACTOR * max(difference(repeated[name], values[name]) for name in fields))
    row_batches, rows_reason = _independent_rows(model, plain, fields)
    cached, cache_reason = _cached_calls(model, plain)
    return BareBase(plain, values, fields, tolerance, tuple(row_batches), rows_reason, cached, cache_reason)


def _independent_rows(
    model: nn.Module, plain: CheckBatch, fields: tuple[str, ...]
) -> tuple[list[tuple[str, CheckBatch, dict[str, float]]], str]:
    """The batches on which a row alone is that row in the batch, with the outputs of which that holds."""
    kept: list[tuple[str, CheckBatch, dict[str, float]]] = []
    reason = ""
    for kind in ("right", "left", ""):
        batch = padded_batch(model, plain, kind) if kind else plain
        if batch is None or (kept and not kind):
            continue
        try:
            together = outputs_of(model, batch)
            alone = [outputs_of(model, batch.rows(i)) for i in range(batch.num_rows)]
            repadded = outputs_of(model, batch.with_other_padding())
        except Exception as error:  # padding or single rows are not what it takes
            reason = f"the base does not run on its rows: {type(error).__name__}: {str(error)[:200]}"
            continue
        noise = {
            name: max(
                difference(row_of(together, i, batch.num_rows)[name], own.get(name, torch.empty(0)))
                for i, own in enumerate(alone)
            )
            for name in fields
        }
        # a convolution may read what is padding, and a pooler of token 0 takes a padding token for its query
        meaningful = [
            name
            for name in fields
            if difference(repadded[name], together[name]) < UNRELATED
            and (kind != "left" or batch.has_tokens(together[name]))
        ]
        independent = {name: d for name, d in noise.items() if d < UNRELATED}
        if kept_here := {name: d for name, d in independent.items() if name in meaningful}:
            kept.append((kind, batch, kept_here))
        elif not independent:
            least = min(noise.values(), key=lambda d: math.inf if math.isnan(d) else d)
            reason = f"the base's own rows depend on each other: a row alone differs by {least:.0e}"
    return kept, "" if kept else reason


def _cached_calls(model: nn.Module, plain: CheckBatch) -> tuple[dict[str, tuple[Stepwise, CheckBatch, float]], str]:
    accepted = inspect.signature(model.forward).parameters
    takes_cache = "input_ids" in accepted and {"use_cache", "past_key_values", "cache_params"} & accepted.keys()
    if not takes_cache and not _can_generate(model):
        return {}, "the base takes none"
    kept: dict[str, tuple[Stepwise, CheckBatch, float]] = {}
    reasons = []
    padded = padded_batch(model, plain, "left") or plain
    if _can_generate(model):
        ways: list[tuple[str, Stepwise, CheckBatch]] = [("generate", generated, padded)]
        if "decoder_input_ids" not in plain.inputs:
            ways.append(("token by token", token_by_token, plain))
    else:
        ways = [("token by token", token_by_token, plain)]
    for way, call, batch in ways:
        try:
            apart = difference(*call(model, batch))
        except Exception as error:
            reasons.append(f"{way}: {type(error).__name__}: {str(error)[:100]}")
            continue
        if apart < UNRELATED:
            kept[way] = (call, batch, apart)
        else:
            reasons.append(f"{way}: the base's own cached logits differ from uncached ones by {apart:.0e}")
    return kept, "" if kept else "the base has no cache to compare; " + "; ".join(reasons)


def _can_generate(model: nn.Module) -> bool:
    ask = getattr(model, "can_generate", None)
    return callable(ask) and bool(ask())


@torch.no_grad()
def generated(model: Any, batch: CheckBatch) -> tuple[Tensor, Tensor]:
    """Logits of greedy generation with the cache and without, up to the first token that they choose apart."""
    inputs = {k: v for k, v in batch.inputs.items() if k not in ("decoder_input_ids", "use_cache", "labels")}
    runs = [
        model.generate(
            **inputs,
            bad_words_ids=[[i] for i in batch.special_ids] or None,
            use_cache=use_cache,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for use_cache in (True, False)
    ]
    steps = 1
    while steps < NEW_TOKENS and torch.equal(*(r.sequences[:, : steps - NEW_TOKENS] for r in runs)):
        steps += 1
    cached, uncached = (torch.stack(list(r.logits)[:steps], 1) for r in runs)
    return cached, uncached


@torch.no_grad()
def token_by_token(model: nn.Module, batch: CheckBatch) -> tuple[Tensor, Tensor]:
    """The main output of half the tokens at once and then one by one with the cache, and of one full forward."""
    accepted = inspect.signature(model.forward).parameters
    ids = batch.inputs["input_ids"]
    mask = batch.inputs.get("attention_mask")
    other = {k: v for k, v in batch.inputs.items() if k not in ("input_ids", "attention_mask", "use_cache")}
    mask = torch.ones_like(ids) if mask is None and "attention_mask" in accepted else mask

    def call(start: int, stop: int, **cache: Any) -> Any:
        masks = {} if mask is None else {"attention_mask": mask[:, :stop]}
        return model(input_ids=ids[:, start:stop], **masks, **(other if start == 0 else {}), **cache)

    def logits(output: Any) -> Tensor:
        found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
        return found

    full = logits(call(0, ids.shape[1], use_cache=False))
    half = ids.shape[1] // 2
    output = call(0, half, use_cache=True)
    key = next(k for k in ("past_key_values", "cache_params") if output.get(k) is not None)
    parts = [logits(output)]
    for position in range(half, ids.shape[1]):
        output = call(position, position + 1, use_cache=True, **{key: output[key]})
        parts.append(logits(output))
    return torch.cat(parts, 1), full
