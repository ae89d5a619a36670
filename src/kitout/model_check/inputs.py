"""What the laws run on: three rows, padded where the model takes a mask, its outputs by name, and how far they differ.

Rows are cut out of whatever batch the model takes. Outputs are compared on real tokens alone, as a share of the
largest value there. It knows the names that transformers gives to inputs and outputs, and no kit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.probe.dummy_batch import dummy_batch
from kitout.errors import ConfigError

Values = dict[str, Tensor]
NUM_ROWS = 3
TEXT_ONLY = {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}
# Outputs that are no result by themselves: states for the next call, and what options ask for.
STATES = (
    "past_key_values",
    "cache_params",
    "hidden_states",
    "attentions",
    "router",
    "mems",
    "state",
    "loss",
    "encoder_",
)


@dataclass(frozen=True)
class CheckBatch:
    """One batch, and which of its tokens are real."""

    inputs: Mapping[str, Any]
    """Keyword arguments of the model."""
    num_rows: int
    """Number of rows."""
    mask: Tensor | None = None
    """[rows, tokens], where there is padding whose outputs mean nothing."""
    special_ids: tuple[int, ...] = ()
    """Ids that stand for something else than text: an image, its parts."""

    def rows(self, *indices: int) -> CheckBatch:
        """These rows, in this order."""
        inputs = {name: self._rows_of(value, indices) for name, value in self.inputs.items()}
        mask = None if self.mask is None else self.mask[list(indices)]
        return replace(self, inputs=inputs, num_rows=len(indices), mask=mask)

    def has_tokens(self, value: Tensor) -> bool:
        """The output has a value for each token; an encoder-decoder's are other tokens, none of them padding."""
        return "decoder_input_ids" in self.inputs or self.mask is None or value.shape[:2] == self.mask.shape

    def with_other_padding(self) -> CheckBatch:
        """The same real tokens, with another token where there is padding."""
        if self.mask is None:
            return self
        ids, real = self.inputs["input_ids"], self.mask.bool()
        return replace(self, inputs={**self.inputs, "input_ids": ids.where(real, ids[real][0])})

    def _rows_of(self, value: Any, indices: tuple[int, ...]) -> Any:
        """The share of each row, which may be several entries (patches of its image); or rows along dimension 1."""
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        n = self.num_rows
        if value.shape[0] != n and value.ndim > 1 and value.shape[1] == n:
            return value[:, list(indices)]
        sizes = self._shares(value)
        if sizes is None:
            return value
        parts = value.split(sizes)
        chosen = torch.cat([parts[i] for i in indices])
        return chosen if len(chosen) else None  # rows without any image

    def _shares(self, value: Tensor) -> list[int] | None:
        """How many of a tensor's entries belong to each row; None where that is not known.

        Two images may stand in one row and none in another: entries then follow the places that a special id holds.
        """
        ids = self.inputs.get("input_ids")
        follows_ids = isinstance(ids, Tensor) and value.shape[:2] != ids.shape[:2]
        for special in self.special_ids if follows_ids else ():
            places = torch.as_tensor(ids).eq(special).sum(1)
            shares = places * len(value) / max(1, int(places.sum()))
            if len(set(places.tolist())) > 1 and bool((shares == shares.round()).all()):
                return [int(share) for share in shares]
        equal, rest = divmod(len(value), self.num_rows)
        return [equal] * self.num_rows if equal and not rest else None


def special_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids that stand for something else than text (the place of an image), as the config names them."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    named = [*vars(config).items(), *vars(text).items()] if config is not None else []
    ids = {v for k, v in named if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    return tuple(sorted(i for i in ids if 0 <= i < getattr(text, "vocab_size", 0)))


def plain_batch(model: nn.Module, example_batch: Mapping[str, Any] | None) -> CheckBatch:
    """Three rows without padding: the batch a probe makes up, or the example's own rows, repeated to three."""
    batch = dummy_batch(model, NUM_ROWS) if example_batch is None else dict(example_batch)
    if batch is None:
        raise ConfigError("no batch can be made up for this model: give one as the model takes it, example_batch=...")
    tensors = [batch.get("input_ids"), *batch.values()]
    num_rows = next((len(v) for v in tensors if isinstance(v, Tensor) and v.ndim > 1), None)
    if not num_rows:
        raise ConfigError(f"the example batch has no rows: its tensors are {', '.join(batch) or 'none'}")
    return CheckBatch(batch, num_rows, special_ids=special_ids(model)).rows(*(i % num_rows for i in range(NUM_ROWS)))


def padded_batch(model: nn.Module, batch: CheckBatch, side: str) -> CheckBatch | None:
    """Rows of different lengths, padded on one side; None where the model takes no mask or it is not text alone.

    The last real token stays the last, since classifiers pool at an end-of-sequence token.
    """
    ids = batch.inputs.get("input_ids")
    if ids is None or "attention_mask" not in inspect.signature(model.forward).parameters:
        return None
    given = batch.inputs.get("attention_mask")
    if not set(batch.inputs) <= TEXT_ONLY or ids.shape[1] < 3 or not (given is None or bool(given.all())):
        return None
    config = getattr(model, "config", None)
    pad = getattr(getattr(config, "get_text_config", lambda: config)(), "pad_token_id", None)
    length = ids.shape[1]
    new, mask = torch.full_like(ids, pad if isinstance(pad, int) and pad >= 0 else 0), torch.zeros_like(ids)
    for row, n in enumerate((length, length // 2, length - 1)):
        real = torch.cat((ids[row, : n - 1], ids[row, -1:]))
        place = slice(length - n, length) if side == "left" else slice(0, n)
        new[row, place], mask[row, place] = real, 1
    return replace(batch, inputs={**batch.inputs, "input_ids": new, "attention_mask": mask}, mask=mask)


def outputs_of(call: Callable[..., Any], batch: CheckBatch) -> Values:
    """The model's floating outputs by name, zeros at padding."""
    found = {
        name: value
        for name, value in _named_tensors(call(**batch.inputs), "")
        if value.is_floating_point() and value.ndim > 1 and value.shape[0] % batch.num_rows == 0
    }
    main = {name: value for name, value in found.items() if not name.startswith(STATES)}
    is_seq2seq = "decoder_input_ids" in batch.inputs
    return {name: value if is_seq2seq else _real(value, batch.mask) for name, value in (main or found).items()}


def _named_tensors(output: Any, name: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from _named_tensors(value, f"{name}[{index}]")


def _real(value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or value.shape[:2] != mask.shape:
        return value
    return torch.where(mask.bool().reshape(*mask.shape, *[1] * (value.ndim - 2)), value, torch.zeros_like(value))


def row_of(values: Values, index: int, num_rows: int) -> Values:
    """The outputs of one row."""
    return {name: value.chunk(num_rows)[index] for name, value in values.items()}


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference where `want` is finite, as a share of its largest value; NaN where `got` is not finite."""
    if got.shape != want.shape:
        return math.inf
    finite = want.isfinite()
    a, b = got.detach()[finite].double(), want.detach()[finite].double()
    if not b.numel():
        return 0.0
    if not bool(a.isfinite().all()):
        return math.nan
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / (scale or 1.0)


def largest_difference(got: Values, want: Values, fields: Iterable[str]) -> float:
    """The largest over these outputs; NaN if any is NaN."""
    found = [difference(got[name], want[name]) if name in got else math.inf for name in fields]
    return worst(found)


def worst(differences: Iterable[float]) -> float:
    """The largest; NaN is worse than any."""
    return max(differences, key=lambda d: math.inf if math.isnan(d) else d, default=0.0)


def random_loss(values: Values, fields: Iterable[str]) -> Tensor:
    """A scalar on which every output bears, each row with the same weights."""
    terms = []
    for name in fields:
        value = values[name]
        weight = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(0)).to(value)
        terms.append((value.nan_to_num(0.0, 0.0, 0.0) * weight).float().sum())
    return torch.stack(terms).sum()
