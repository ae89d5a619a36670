"""Widening a sequence by prompts, for stacks whose tokens look ahead: placeholders in, prompts over them, outputs back.

A row of l pads, text and more pads becomes l pads, prompt, text and pads, so the first token stays where it was found
and rows with shorter prompts are padded at the right. The caller gets back the columns it sent. It knows calls by the
names transformers gives their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kitout.errors import RouteError
from kitout.runtime.hooks.class_swap import Forward, Program
from kitout.runtime.modules.module_adapter import Part
from kitout.runtime.modules.programs import join, split
from kitout.runtime.modules.rows import Plan
from kitout.runtime.virtual_tokens.forward_state import Call, Here

MASK, WIDE = "attention_mask", ("token_type_ids", "position_ids", "inputs_embeds")


@dataclass(frozen=True)
class Columns:
    """source [B, W]: the caller's column each new one comes from. prompt [B, W]: it is a prompt's, number slot.
    pad [B, W]: it is nobody's. back [B, T]: where the caller's columns went; a pooled prompt's first is where the
    text's first was.
    """

    source: Tensor
    prompt: Tensor
    slot: Tensor
    pad: Tensor
    back: Tensor


class Widening:
    """The prompts of one stack. parts: by entry, in order. crossed: another stack reads what this one gives."""

    def __init__(
        self, tower: str, table: str, parts: Sequence[Sequence[Part]], plan: Plan | None, crossed: bool
    ) -> None:
        self.tower, self.table, self.parts, self.plan, self.crossed = tower, table, parts, plan, crossed
        self.lengths = [sum(p.delta.length for p in each) for each in parts]
        self.longest = max(self.lengths)

    def widen(self, module: nn.Module, call: dict[str, Any], here: Call) -> None:
        """The call with the prompts' columns in everything that has the caller's; the table will be overwritten."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        text = ids if ids is not None else embeds
        assert text is not None
        mask = self._mask(call.get(MASK), text)
        at = self._columns(mask)
        if ids is not None:
            filler = getattr(getattr(module, "config", None), "pad_token_id", None) or 0
            new = ids.gather(1, at.source).masked_fill(at.pad, filler)
            first = ids.gather(1, (mask.cumsum(1) == 0).sum(1, keepdim=True).clamp_max(ids.shape[1] - 1))
            call["input_ids"] = torch.where(at.prompt, first, new)  # an ordinary id, where models count those
        call[MASK] = _taken(mask, at).masked_fill(at.prompt, 1).to(mask.dtype)
        for name in WIDE:
            if isinstance(call.get(name), Tensor):
                call[name] = _taken(call[name].expand(text.shape[0], *call[name].shape[1:]), at)
        if isinstance(call.get("position_ids"), Tensor):
            call["position_ids"] = torch.where(at.prompt, at.slot, call["position_ids"])

        def overwrite(value: Tensor) -> Tensor:
            return torch.where(at.prompt[..., None], self._vectors(at, value), value)

        if embeds is None:
            here.rewrite[self.table] = overwrite
        else:
            call["inputs_embeds"] = overwrite(call["inputs_embeds"])
        here.back[self.tower], here.wide[self.tower] = at.back, at.source.shape[1]

    def widen_mask(self, call: dict[str, Any], here: Call) -> None:
        """The mask of the states that another stack reads, if those have prompts in them."""
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if not isinstance(states, Tensor):
            return
        text = mask.shape[1] if isinstance(mask, Tensor) else states.shape[1] - self.longest
        if text < 1 or states.shape[1] != text + self.longest:
            raise RouteError(
                f"the encoder's states have {states.shape[1]} tokens, and the prompt of {self.longest} before {text} "
                "would make more: give encoder_outputs of model.get_encoder() under this very route"
            )
        narrow = torch.ones(states.shape[0], states.shape[1] - self.longest, dtype=torch.long, device=states.device)
        narrow = self._mask(mask, narrow)
        at = self._columns(narrow)
        call["encoder_attention_mask"] = _taken(narrow, at).masked_fill(at.prompt, 1).to(narrow.dtype)
        here.back[self.tower], here.wide[self.tower] = at.back, at.source.shape[1]

    @staticmethod
    def _mask(mask: Any, text: Tensor) -> Tensor:
        if mask is None:
            return torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise RouteError("a prompt needs a mask of [batch, tokens] to find where each row's text begins")
        return mask

    def _columns(self, mask: Tensor) -> Columns:
        rows, tokens = mask.shape
        entries = [0] * rows if self.plan is None else self.plan.expanded(rows)
        length = torch.tensor([self.lengths[e] for e in entries], device=mask.device)[:, None]
        after = torch.tensor([any(p.delta.after for p in self.parts[e]) for e in entries], device=mask.device)[:, None]
        pooled = torch.tensor([any(p.delta.pooled for p in self.parts[e]) for e in entries], device=mask.device)[
            :, None
        ]
        pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        start = (pads + after).clamp_max(tokens)
        new = torch.arange(tokens + self.longest, device=mask.device)[None].expand(rows, -1)
        old = torch.arange(tokens, device=mask.device)[None].expand(rows, -1)
        prompt = (new >= start) & (new < start + length)
        source = torch.where(new < start, new, new - length)
        pad = (source >= tokens) & ~prompt
        return Columns(
            source.clamp(0, tokens - 1), prompt, (new - start).clamp(0, max(0, self.longest - 1)), pad,
            torch.where((old < start) | (pooled & (old == start)), old, old + length),
        )  # fmt: skip

    def _vectors(self, at: Columns, like: Tensor) -> Tensor:
        """[B, W, d]: at a prompt's columns its vectors, anything elsewhere."""
        tables = []
        for each, length in zip(self.parts, self.lengths, strict=True):
            rest = like.new_zeros(self.longest - length, like.shape[-1])
            tables.append(torch.cat([*(p.delta.tokens().to(like.dtype) for p in each), rest]))
        entries = [0] * len(at.slot) if self.plan is None else self.plan.expanded(len(at.slot))
        owner = torch.tensor(entries, device=like.device)[:, None]
        return torch.stack(tables)[owner, at.slot]


def _taken(value: Tensor, at: Columns) -> Tensor:
    """A value [B, T, ...] by new columns, zero where nobody's."""
    index = at.source.reshape(*at.source.shape, *(1,) * (value.ndim - 2))
    new = value.gather(1, index.expand(-1, -1, *value.shape[2:]))
    return new.masked_fill((at.pad | at.prompt).reshape(index.shape), 0)


class Trim:
    """The program of what ends a stack: what comes after it sees the caller's columns alone."""

    def __init__(self, tower: str, here: Here, then: Program | None) -> None:
        self.tower, self.here, self.then = tower, here, then

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = forward(module, *args, **kwargs) if self.then is None else self.then(module, forward, args, kwargs)
        if isinstance(out, Mapping):
            return trimmed(out, self.here.call, self.tower)
        y, whole = split(out)
        return join(narrowed(y, self.here.call, self.tower), whole)


def narrowed(value: Tensor, call: Call, tower: str) -> Tensor:
    """[B, W, d] -> [B, T, d]; anything else as it is."""
    back = call.back.get(tower)
    if back is None or value.ndim != 3 or value.shape[1] != call.wide[tower] or value.shape[0] != back.shape[0]:
        return value
    return value.gather(1, back[..., None].expand(-1, -1, value.shape[2]))


def trimmed(output: Any, call: Call, tower: str, names: Sequence[str] = ("last_hidden_state", "hidden_states")) -> Any:
    """A model's output with the stack's hidden states in the caller's columns."""
    if tower not in call.back:
        return output
    if isinstance(output, tuple) and not isinstance(output, Mapping):
        return tuple(_narrowed_all(value, call, tower) for value in output)
    if not isinstance(output, Mapping):
        return output
    for name in names:
        value = output.get(name)
        if value is not None:
            output[name] = _narrowed_all(value, call, tower)  # type: ignore[index]
    return output


def _narrowed_all(value: Any, call: Call, tower: str) -> Any:
    """A tensor or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_narrowed_all(v, call, tower) for v in value)
    return narrowed(value, call, tower) if isinstance(value, Tensor) else value
