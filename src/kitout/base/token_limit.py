"""How many tokens a model reads in one text: by the rows of its position table, else found by running it.

A table ends where its rows do, less those before position 0. A model without one may still end somewhere: positions
that are computed once, masks of a fixed width. No list of names says so, but a text that does not run does. What a
model was trained on is only its config's word. It knows towers and forwards, and nothing of adapters or tokenizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kitout.base.memory import is_out_of_memory
from kitout.base.probe.dummy_batch import dummy_batch
from kitout.base.survey import Survey, Tower

# Fields of a config that name a number of positions, in transformers' spellings.
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
MAX_OFFSET = 8  # positions that a model may lack of those its config names


def num_positions(model: nn.Module, tower: Tower) -> int | None:
    """Positions of a tower's table, from its offset on; None without a table."""
    if not tower.position_embedding:
        return None
    weight = getattr(model.get_submodule(tower.position_embedding), "weight", None)
    return None if weight is None else int(weight.shape[0]) - tower.offset


def token_towers(survey: Survey) -> tuple[Tower | None, Tower | None]:
    """The towers that read the text and, in an encoder-decoder, write the target; None where it is not known."""
    crossed = {s.tower for s in survey.sites if s.role.startswith("cross.")}
    towers = [t for t in survey.towers if t.embedder is not None]
    text = next((t for t in towers if t.path not in crossed), None)
    return text, next((t for t in towers if t.path in crossed), None)


def trained_length(model: nn.Module) -> int | None:
    """The positions that the model's config names; None where it names none."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    values = (getattr(config.get_text_config(), name, None) for name in POSITION_FIELDS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def long_batch(model: nn.Module, num_tokens: int, num_target_tokens: int | None) -> dict[str, Any] | None:
    """One row of so many ordinary tokens; None for a model that reads none. num_target_tokens: of a target."""
    batch = dummy_batch(model, 1)
    if batch is None or "input_ids" not in batch:
        return None
    batch["input_ids"] = _stretch(batch["input_ids"], num_tokens)
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = _stretch(batch["decoder_input_ids"], num_target_tokens or 2)
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "logits_to_keep" in accepted:
        batch["logits_to_keep"] = 1
    return batch


def _stretch(ids: Tensor, num_tokens: int) -> Tensor:
    """The same ids again and again; the last one stays the last."""
    repeated = ids[:, :-1].repeat(1, -(-num_tokens // (ids.shape[1] - 1)))
    return torch.cat((repeated[:, : num_tokens - 1], ids[:, -1:]), 1)


@torch.no_grad()
def runs(call: Callable[..., Any], batch: Mapping[str, Any]) -> bool:
    """Whether a forward of the batch ends without an error. Raises where memory runs out, which says nothing."""
    on_gpu = any(isinstance(value, Tensor) and value.device.type != "cpu" for value in batch.values())
    try:
        with _CheckedLookups() if on_gpu else nullcontext():
            call(**batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def longest_that_runs(does_run: Callable[[int], bool], wanted: int, likely: int | None = None) -> int:
    """The largest number of tokens up to `wanted` that runs. likely: is tried first; each try costs a forward."""
    if does_run(wanted):
        return wanted
    low, high = 0, wanted
    for tried in (likely, None if likely is None else likely + 1):
        if tried is not None and low < tried < high:
            low, high = (tried, high) if does_run(tried) else (low, tried)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does_run(middle) else (low, middle)
    return low


class _CheckedLookups(TorchDispatchMode):
    """Raises IndexError before a GPU looks up what is not there: its own error ends every later call as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, operation = torch.ops.aten, func.overloadpacket
        if operation is aten.embedding:
            _check_indices(args[1], args[0].shape[0])
        elif operation in (aten.gather, aten.index_select):
            _check_indices(args[2], args[0].shape[args[1]] if args[0].ndim else 1)
        elif operation is aten.index and not any(i is not None and i.dtype == torch.bool for i in args[1]):
            for indices, size in zip(args[1], args[0].shape, strict=False):
                if indices is not None:
                    _check_indices(indices, size)
        return func(*args, **(kwargs or {}))


def _check_indices(indices: Tensor, size: int) -> None:
    if indices.numel() and not -size <= int(indices.min()) <= int(indices.max()) < size:
        raise IndexError(f"index out of range: {size} entries")
