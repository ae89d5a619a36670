"""The log-likelihood of each of a few labels after a prompt: what the model finds likely, not what it generates.

A label's score is the log-likelihood of its tokens given the prompt, equal to that of one forward over both. A decoder
computes each prompt once for all labels, where its cache can be cropped. It knows no template and no metric.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.data.padding import pad
from kitout.errors import ConfigError, Errors
from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.evaluate.ask.text_limit import check_prompts, has_virtual_tokens
from kitout.kit import Kit


def label_likelihoods(
    kit: Kit,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    end_id: int,
    batch_size: int = 32,
    on_progress: ProgressFn | None = None,
) -> Tensor:
    """Log-likelihood of each label (ids) after each prompt (ids), [prompts, labels], with the active adapters.

    end_id: the id that ends an answer. Where one label is a prefix of another ("1", "10"), it is appended to every
    label: else the shorter would always win. ConfigError where a prompt and a label are longer than the model reads.
    """
    answers = [list(label) for label in labels]
    _check_labels(answers)
    if any(a is not b and b[: len(a)] == a for a in answers for b in answers):
        answers = [[*a, end_id] for a in answers]
    check_prompts(kit, prompts, 0 if kit.config.is_encoder_decoder else max(map(len, answers)) - 1)
    ask = (
        _encoder_decoder_scorer(kit, answers, end_id)
        if kit.config.is_encoder_decoder
        else _decoder_scorer(kit, answers, end_id)
    )
    with eval_mode(kit.base, kit):
        rows = map_batches(prompts, batch_size, ask, on_progress)
    return torch.stack(rows) if rows else torch.zeros(0, len(answers))


def _check_labels(answers: Sequence[Sequence[int]]) -> None:
    errors = Errors(ConfigError, "labels")
    if len(answers) < 2:
        errors.add(f"{len(answers)} given, expected at least 2 to choose from")
    errors.messages += [f"number {i} has no token" for i, answer in enumerate(answers) if not answer]
    duplicates = [i for i, answer in enumerate(answers) if answer in answers[:i]]
    errors.messages += [f"number {i} has the same tokens as an earlier one: {answers[i]}" for i in duplicates]
    errors.raise_if_any()


def _decoder_scorer(kit: Kit, answers: list[list[int]], pad_token_id: int) -> Any:
    parameters = inspect.signature(kit.base.forward).parameters
    # virtual tokens shift the positions of the text, unless the caller passes position ids
    with_position_ids = "position_ids" in parameters and not has_virtual_tokens(kit)

    def ask(prompts: list[Sequence[int]]) -> list[Tensor]:
        ids, mask = pad(prompts, pad_token_id, "left", kit.device)
        position_ids = (mask.cumsum(1) - 1).clamp_min(0) if with_position_ids else None
        options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if "logits_to_keep" in parameters:
            options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=kit.device)
        out = kit(input_ids=ids, attention_mask=mask, use_cache=max(map(len, answers)) > 1, **options)
        first = _log_probs(out.logits[:, -1])
        columns = []
        for answer in answers:
            if len(answer) > 1 and not _can_crop(out.past_key_values):
                columns.append(_score_uncached(kit, prompts, answer, pad_token_id, with_position_ids))
                continue
            score = first[:, answer[0]]
            if len(answer) > 1:
                score = score + _score_rest(kit, mask, position_ids, out.past_key_values, answer)
            columns.append(score)
        return list(torch.stack(columns, dim=1).cpu())

    return ask


def _can_crop(cache: Any) -> bool:
    """Whether the last tokens can be removed from a cache: from recurrent states or a sliding window they cannot."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _score_rest(kit: Kit, mask: Tensor, position_ids: Tensor | None, cache: Any, answer: list[int]) -> Tensor:
    """Log-likelihood of an answer's tokens after the first, with the prompt's cache, which is cropped back."""
    ids = torch.tensor([answer[:-1]] * len(mask), device=kit.device)
    positions = {}
    if position_ids is not None:
        positions = {"position_ids": position_ids[:, -1:] + torch.arange(1, len(answer), device=kit.device)}
    full_mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    out = kit(input_ids=ids, attention_mask=full_mask, past_key_values=cache, use_cache=True, **positions)
    cache.crop(1 - len(answer))  # negative: the number of tokens to remove
    return _sum_log_probs(out.logits, answer[1:])


def _score_uncached(
    kit: Kit, prompts: list[Sequence[int]], answer: list[int], pad_token_id: int, with_position_ids: bool
) -> Tensor:
    """Log-likelihood of an answer by a separate forward."""
    ids, mask = pad([[*prompt, *answer[:-1]] for prompt in prompts], pad_token_id, "left", kit.device)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if with_position_ids else {}
    out = kit(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    return _sum_log_probs(out.logits[:, -len(answer) :], answer)


def _encoder_decoder_scorer(kit: Kit, answers: list[list[int]], pad_token_id: int) -> Any:
    start = kit.config.decoder_start_token_id

    def ask(prompts: list[Sequence[int]]) -> list[Tensor]:
        ids, mask = pad(prompts, pad_token_id, "right", kit.device)
        columns = []
        for answer in answers:
            decoder_ids = torch.tensor([[start, *answer[:-1]]] * len(prompts), device=kit.device)
            out = kit(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
            columns.append(_sum_log_probs(out.logits, answer))
        return list(torch.stack(columns, dim=1).cpu())

    return ask


def _sum_log_probs(logits: Tensor, answer: list[int]) -> Tensor:
    """Summed log-likelihood of token ids; logits [B, T, V] predict one id per position."""
    targets = torch.tensor(answer, device=logits.device).expand(len(logits), -1)
    return _log_probs(logits).gather(2, targets[..., None]).sum(dim=(1, 2))


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1)
