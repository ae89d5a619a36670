"""Answers to the same prompt: the prompt runs once, and each answer goes on from its keys and values, with gradients.

A prompt's last token stays with the answers, whose first tokens it predicts. Both are padded on the right: padding on
the left would see nothing, and be NaN in some models. The values are those of whole rows up to rounding, and
`AnswerScorer.choose` compares both on the model at hand. It knows rows and one model call, and no loss.
The idea: Prefix Grouper, arXiv 2506.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitout import fast
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import pad
from kitout.evaluate.ask.cache_rows import can_select_rows, select_rows
from kitout.train.objectives.lm_head_loss import HeadLoss, replaced_forward

MOST_OF_TOKENS = 0.8  # of whole rows, padding included: where sharing leaves more, a second call is not worth it


@dataclass(frozen=True)
class SharedPrompts:
    """The rows of one batch, taken apart."""

    prompts: dict[str, Any]
    """What the model is called with first: distinct prompts but for their last token, [P, S]."""
    answers: dict[str, Any]
    """And then: from the prompt's last token to the one before the answer's last, [B, A], masked over [B, S + A]."""
    index: Tensor
    """[B]: which prompt a row goes on from."""
    positions: Tensor
    """[N]: those that predict a target, flat in [B * A], row by row."""

    @classmethod
    def of(cls, rows: Sequence[EncodedExample], device: torch.device) -> SharedPrompts | None:
        """None where rows have a prompt of one token or none, most of them their own, or too few tokens are saved."""
        if not fast.enabled() or _shared_tokens(rows) is None:
            return None
        starts = [row.prompt_length - 1 for row in rows]
        heads = [row.input_ids[:start] for start, row in zip(starts, rows, strict=True)]
        tails = [row.input_ids[start:-1] for start, row in zip(starts, rows, strict=True)]
        numbers = {head: number for number, head in enumerate(dict.fromkeys(heads))}
        ids, mask = pad(list(numbers), 0, "right", device)  # on the left, padding would see nothing at all
        tail_ids, tail_mask = pad(tails, 0, "right", device)
        index = torch.tensor([numbers[head] for head in heads], device=device)
        width = tail_ids.shape[1]
        positions = [
            r * width + t - row.prompt_length
            for r, row in enumerate(rows)
            for t, label in enumerate(row.labels)
            if label != IGNORE_INDEX
        ]
        steps = (tail_mask.cumsum(1) - 1).clamp_min(0)
        return cls(
            {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)},
            {
                "input_ids": tail_ids,
                "attention_mask": torch.cat((mask[index], tail_mask), 1),
                "position_ids": mask.sum(1)[index, None] + steps,
            },
            index,
            torch.tensor(positions, dtype=torch.long, device=device),
        )

    def log_probs(
        self, head: HeadLoss, model: Any, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """`HeadLoss.log_probs` of these rows; None where the model keeps no keys that rows can be selected from."""
        assert head.head is not None, "in whose place nothing is computed for prompts"
        size = head.head.out_features
        with replaced_forward(head.head, lambda h, *_, **__: h.new_zeros(1, 1, size)):
            cache = model(**self.prompts, use_cache=True).get("past_key_values")
        width = self.prompts["input_ids"].shape[1]
        if not can_select_rows(cache) or cache.get_seq_length() != width or any(cache.is_sliding):
            return None

        def run_model() -> Any:
            rows = select_rows(cache, self.index, len(self.prompts["input_ids"]))
            return model(**self.answers, past_key_values=rows, use_cache=True)

        return head.log_probs(run_model, self.positions, labels, temperature)


def forward_tokens(rows: Sequence[EncodedExample]) -> int:
    """Tokens that a model works through for one batch of these rows, padding included, as it would run."""
    shared = _shared_tokens(rows)
    return len(rows) * max((row.length for row in rows), default=0) if shared is None else shared


def _shared_tokens(rows: Sequence[EncodedExample]) -> int | None:
    """Of shared prompts and what follows them; None where `SharedPrompts.of` is None."""
    starts = [row.prompt_length - 1 for row in rows]
    if min(starts, default=0) < 1 or any(start + 2 > row.length for start, row in zip(starts, rows, strict=True)):
        return None
    num_prompts = len({row.input_ids[:start] for start, row in zip(starts, rows, strict=True)})
    if 2 * num_prompts > len(rows):
        return None
    longest = max(row.length - 1 - start for start, row in zip(starts, rows, strict=True))
    num_shared = num_prompts * max(starts) + len(rows) * longest
    return None if num_shared > MOST_OF_TOKENS * len(rows) * max(row.length for row in rows) else num_shared
