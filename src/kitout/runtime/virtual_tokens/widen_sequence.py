"""Widening a sequence by prompts, before bidirectional blocks: placeholders in, prompts over them, outputs trimmed.

A row of l pads, text and more pads becomes l pads, prompt, text and pads, so the first token stays where it was
and rows with shorter prompts are padded at the right. The caller gets back the columns it sent. It knows calls by the
names transformers gives their arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kitout.device_constants import constant
from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import ForwardFn, Program
from kitout.runtime.modules.module_adapter import SiteDelta
from kitout.runtime.modules.programs import repack_output, unpack_output
from kitout.runtime.modules.rows import RowPlan
from kitout.runtime.virtual_tokens.forward_state import ForwardSlot, ForwardState

MASK_NAME = "attention_mask"
WIDENED_NAMES = (
    *("token_type_ids", "position_ids", "inputs_embeds", "bbox", "xpath_tags_seq", "xpath_subs_seq", "langs"),
    *("task_type_ids", "global_attention_mask", "mm_token_type_ids"),
)
# Not of the stack's own input tokens, whatever their shape: of its output, of another stack, of images.
OTHER_NAMES = re.compile(r"labels|\w+_labels|(start|end)_positions|(encoder|decoder|cross|visual|image|pixel|past)_\w+")
ORDINARY = ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start")  # special ids that stand for no image


@dataclass(frozen=True)
class ColumnMap:
    """Where the columns of a widened sequence come from."""

    source: Tensor
    """[B, W]: the caller's column that each new one comes from."""
    prompt: Tensor
    """[B, W]: it is a column of a prompt."""
    slot: Tensor
    """[B, W]: the number of a prompt's column in the prompt."""
    pad: Tensor
    """[B, W]: it is padding."""
    caller_columns: Tensor
    """[B, T]: where the caller's columns went; a pooled prompt's first is where the text's first was."""


class SequenceWidener:
    """The prompts of one stack. parts: by entry, in order. read_by_decoder: another stack reads this one's output."""

    def __init__(
        self,
        tower: str,
        table: str,
        parts: Sequence[Sequence[SiteDelta]],
        row_plan: RowPlan | None,
        read_by_decoder: bool,
    ) -> None:
        self.tower, self.table, self.parts = tower, table, parts
        self.row_plan, self.read_by_decoder = row_plan, read_by_decoder
        self.lengths = [sum(p.delta.num_tokens for p in each) for each in parts]
        self.max_length = max(self.lengths)

    def widen(self, module: nn.Module, call: dict[str, Any], forward_state: ForwardState) -> None:
        """The call with the prompts' columns in everything that has the caller's; the table will be overwritten."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        text = ids if ids is not None else embeds
        assert text is not None
        mask = self._mask(call.get(MASK_NAME), text)
        columns = self._columns(mask)
        if ids is not None:
            pad_token_id = getattr(getattr(module, "config", None), "pad_token_id", None) or 0
            new = ids.gather(1, columns.source).masked_fill(columns.pad, pad_token_id)
            first = ids.gather(1, (mask.cumsum(1) == 0).sum(1, keepdim=True).clamp_max(ids.shape[1] - 1))
            call["input_ids"] = torch.where(columns.prompt, _ordinary(first, module), new)  # where models count those
        call[MASK_NAME] = _map_columns(mask, columns).masked_fill(columns.prompt, 1).to(mask.dtype)
        for name in WIDENED_NAMES:
            if isinstance(call.get(name), Tensor):
                call[name] = _map_columns(call[name].expand(text.shape[0], *call[name].shape[1:]), columns)
        self._check_others(call, text)
        if isinstance(call.get("position_ids"), Tensor):
            call["position_ids"] = torch.where(columns.prompt, columns.slot, call["position_ids"])

        def overwrite(value: Tensor) -> Tensor:
            if value.shape[:2] != columns.prompt.shape:
                raise RouteError(
                    f"{self.table} was looked up at {list(value.shape[:2])}, and the text with its prompt is "
                    f"{list(columns.prompt.shape)}: the model adds tokens of its own, among which a prompt has no place"
                )
            value = value.masked_fill(columns.pad[..., None], 0)  # where tables are read with their neighbors
            return torch.where(columns.prompt[..., None], self._vectors(columns, value), value)

        if embeds is None:
            forward_state.pending_rewrites[self.table] = overwrite
        else:
            call["inputs_embeds"] = overwrite(call["inputs_embeds"])
        forward_state.caller_columns[self.tower] = columns.caller_columns
        forward_state.widened_width[self.tower] = columns.source.shape[1]

    def _check_others(self, call: dict[str, Any], text: Tensor) -> None:
        """RouteError for what seems to have a value for each token, and is not known to."""
        for name, value in call.items():
            known = name in (MASK_NAME, "input_ids", *WIDENED_NAMES) or OTHER_NAMES.fullmatch(name)
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == text.shape[:2] and not known:
                raise RouteError(
                    f"{name} of shape {list(value.shape)} has a value for each of {text.shape[1]} tokens, and none is "
                    "known for those of a prompt: leave it out, or use PrefixTuning"
                )

    def widen_mask(self, call: dict[str, Any], forward_state: ForwardState) -> None:
        """The mask of the states that another stack reads, if those have prompts in them."""
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if not isinstance(states, Tensor):
            return
        text = mask.shape[1] if isinstance(mask, Tensor) else states.shape[1] - self.max_length
        if text < 1 or states.shape[1] != text + self.max_length:
            raise RouteError(
                f"the encoder's states have {states.shape[1]} tokens, and the prompt of {self.max_length} "
                f"before {text} "
                "would make more: pass encoder_outputs of model.get_encoder() under this very route"
            )
        narrow = torch.ones(states.shape[0], states.shape[1] - self.max_length, dtype=torch.long, device=states.device)
        narrow = self._mask(mask, narrow)
        columns = self._columns(narrow)
        call["encoder_attention_mask"] = _map_columns(narrow, columns).masked_fill(columns.prompt, 1).to(narrow.dtype)
        forward_state.caller_columns[self.tower] = columns.caller_columns
        forward_state.widened_width[self.tower] = columns.source.shape[1]

    @staticmethod
    def _mask(mask: Any, text: Tensor) -> Tensor:
        if mask is None:
            return torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise RouteError("a prompt needs a mask of [batch, tokens] to find where each row's text begins")
        return mask

    def _columns(self, mask: Tensor) -> ColumnMap:
        rows, tokens = mask.shape
        entries = [0] * rows if self.row_plan is None else self.row_plan.repeat_to(rows)
        is_after = tuple(any(p.delta.after_first_token for p in self.parts[e]) for e in entries)
        is_pooled = tuple(any(p.delta.pooled_by_classifier for p in self.parts[e]) for e in entries)
        length = constant(tuple(self.lengths[e] for e in entries), mask.device, torch.long)[:, None]
        after, pooled = (constant(each, mask.device, torch.bool)[:, None] for each in (is_after, is_pooled))
        pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        start = (pads + after).clamp_max(tokens)
        new = torch.arange(tokens + self.max_length, device=mask.device)[None].expand(rows, -1)
        old = torch.arange(tokens, device=mask.device)[None].expand(rows, -1)
        prompt = (new >= start) & (new < start + length)
        source = torch.where(new < start, new, new - length)
        pad = (source >= tokens) & ~prompt
        return ColumnMap(
            source.clamp(0, tokens - 1), prompt, (new - start).clamp(0, max(0, self.max_length - 1)), pad,
            torch.where((old < start) | (pooled & (old == start)), old, old + length),
        )  # fmt: skip

    def _vectors(self, columns: ColumnMap, like: Tensor) -> Tensor:
        """[B, W, d]: at a prompt's columns its vectors, anything elsewhere."""
        tables = []
        for each, length in zip(self.parts, self.lengths, strict=True):
            rest = like.new_zeros(self.max_length - length, like.shape[-1])
            tables.append(torch.cat([*(p.delta.token_vectors().to(like.dtype) for p in each), rest]))
        entries = [0] * len(columns.slot) if self.row_plan is None else self.row_plan.repeat_to(len(columns.slot))
        owner = constant(tuple(entries), like.device, torch.long)[:, None]
        return torch.stack(tables)[owner, columns.slot]


def _ordinary(ids: Tensor, module: nn.Module) -> Tensor:
    """These ids, but for those that stand for an image, sound and the like, which models count: an ordinary one."""
    config = getattr(module, "config", None)
    named = [(n, v) for c in _configs(config) for n, v in vars(c).items() if n.endswith(("_token_id", "_token_index"))]
    special = {v: n.rpartition("_token_")[0] for n, v in named if isinstance(v, int)}
    media = [v for v, name in special.items() if name not in ORDINARY]
    if not media:
        return ids
    ordinary = next(i for i in range(len(special) + 1) if i not in special)
    return ids.masked_fill(torch.isin(ids, constant(tuple(media), ids.device, ids.dtype)), ordinary)


def _configs(config: Any) -> Iterator[Any]:
    """A config and those in it."""
    if config is not None:
        yield config
        for name in getattr(config, "sub_configs", ()):
            yield from _configs(getattr(config, name, None))


def _map_columns(value: Tensor, columns: ColumnMap) -> Tensor:
    """A value [B, T, ...] by new columns, zero in prompts and padding."""
    index = columns.source.reshape(*columns.source.shape, *(1,) * (value.ndim - 2))
    new = value.gather(1, index.expand(-1, -1, *value.shape[2:]))
    return new.masked_fill((columns.pad | columns.prompt).reshape(index.shape), 0)


class TrimOutput:
    """The program of what ends a stack: what comes after it sees the caller's columns alone."""

    def __init__(self, tower: str, forward_slot: ForwardSlot, inner: Program | None) -> None:
        self.tower, self.forward_slot, self.inner = tower, forward_slot, inner

    def __call__(self, module: nn.Module, forward: ForwardFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = forward(module, *args, **kwargs) if self.inner is None else self.inner(module, forward, args, kwargs)
        if isinstance(out, Mapping):
            return trim_output(out, self.forward_slot.state, self.tower)
        y, wrapping = unpack_output(out)
        return repack_output(trim_tensor(y, self.forward_slot.state, self.tower), wrapping)


def trim_tensor(value: Tensor, forward_state: ForwardState, tower: str) -> Tensor:
    """[B, W, d] -> [B, T, d]; anything else as it is."""
    caller_columns = forward_state.caller_columns.get(tower)
    if (
        caller_columns is None
        or value.ndim != 3
        or value.shape[1] != forward_state.widened_width[tower]
        or value.shape[0] != caller_columns.shape[0]
    ):
        return value
    return value.gather(1, caller_columns[..., None].expand(-1, -1, value.shape[2]))


def trim_output(
    output: Any, forward_state: ForwardState, tower: str, names: Sequence[str] = ("last_hidden_state", "hidden_states")
) -> Any:
    """A model's output with the stack's hidden states in the caller's columns."""
    if tower not in forward_state.caller_columns:
        return output
    if isinstance(output, tuple) and not isinstance(output, Mapping):
        return tuple(_trim_all(value, forward_state, tower) for value in output)
    if not isinstance(output, Mapping):
        return output
    for name in names:
        value = output.get(name)
        if value is not None:
            output[name] = _trim_all(value, forward_state, tower)  # type: ignore[index]
    return output


def _trim_all(value: Any, forward_state: ForwardState, tower: str) -> Any:
    """A tensor or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_trim_all(v, forward_state, tower) for v in value)
    return trim_tensor(value, forward_state, tower) if isinstance(value, Tensor) else value
