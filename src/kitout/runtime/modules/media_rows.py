"""Whether the images, videos and sounds of one call can be dealt to its rows: each row has as many, all of one size.

A tower inside a vision-language model sees images one after the other, not rows: which row an image belongs to is in
the text's placeholders. Where every row has the same number of them and the images are alike, the tower's first
dimension holds equal parts in the order of the rows; else it does not. It knows calls by the names and shapes of
transformers' arguments, no architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Arguments that have one entry per token or per row of the text, or nothing of one call's media.
TEXT_ARGUMENTS = re.compile(
    r"(decoder_)?(input_ids|inputs_embeds|attention_mask|position_ids|token_type_ids|head_mask)|labels|past_key_values"
    r"|cache_position|encoder_\w+|cross_attn_head_mask|logits_to_keep"
)
TEXT_TOKENS = re.compile(r"(\w+_)?(pad|bos|eos|sep|cls|unk|mask|start|end|decoder_start)_token_(id|index)")
PLACEHOLDER = re.compile(r"\w+_token_(id|index)")


def media_of(call: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Every tensor of a call that is not its text, by name; a list where the caller gave one."""
    result: dict[str, list[Tensor]] = {}
    for name, value in call.items():
        tensors = [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else [value]
        if tensors and all(isinstance(t, Tensor) and t.ndim for t in tensors) and not TEXT_ARGUMENTS.fullmatch(name):
            result[name] = tensors
    return result


def media_refusal(config: Any, call: Mapping[str, Any], rows: int) -> tuple[str, int]:
    """Why the media of a call cannot be dealt to its rows ("": they can), and how many there are (0: no media)."""
    media = media_of(call)
    if not any(t.is_floating_point() for tensors in media.values() for t in tensors):
        return "", 0
    text = call.get("input_ids")
    if not isinstance(text, Tensor):
        if isinstance(call.get("inputs_embeds"), Tensor):
            return "without input_ids nobody can see which row an image belongs to", 0
        return "", 0
    by_token = {n: t[0] for n, t in media.items() if len(t) == 1 and _is_by_token(t[0], text)}
    counts = {name: (text == token_id).sum(1) for name, token_id in _placeholders(config)}
    counts |= {name: (t != 0).sum(1) for name, t in by_token.items() if t.ndim == 2}
    for name, count in counts.items():
        if bool((count != count[0]).any()):
            return f"the rows have {count.tolist()} of {name}, not one number for all", 0
    is_counted = any(bool(count.any()) for count in counts.values())
    number = 0
    for name, tensors in media.items():
        if name not in by_token:
            if refusal := _refusal_of(name, tensors, rows, is_counted):
                return refusal, 0
            number = number or (len(tensors) if len(tensors) > 1 else tensors[0].shape[0])
    return "", number


def _refusal_of(name: str, tensors: list[Tensor], rows: int, is_counted: bool) -> str:
    """Why one argument cannot be dealt to rows. is_counted: each row is known to have as many."""
    shapes = {tuple(t.shape) for t in tensors}
    n = tensors[0].shape[0] if len(tensors) == 1 else len(tensors)
    if len(shapes) > 1:
        return f"{name} has tensors of shapes {sorted(shapes)}"
    if n % rows or (n != rows and not is_counted):
        return f"{name} has {n} entries for {rows} rows"
    if tensors[0].is_floating_point():
        return ""
    each = (torch.stack(tensors) if len(tensors) > 1 else tensors[0]).reshape(rows, -1)
    return f"{name} is not the same in all rows" if bool((each != each[:1]).any()) else ""


def _placeholders(config: Any) -> Iterator[tuple[str, int]]:
    """The ids that stand for media in the text, by their names in the config."""
    for name, value in vars(config).items() if config is not None else ():
        if isinstance(value, int) and PLACEHOLDER.fullmatch(name) and not TEXT_TOKENS.fullmatch(name):
            yield name, value


def _is_by_token(value: Tensor, text: Tensor) -> bool:
    """Whether it has one entry per token of the text: marks of the images' places, a mask of tokens by images."""
    return value.shape[:2] == text.shape and not value.is_floating_point()
