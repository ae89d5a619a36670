"""Which of a few answers a model finds likeliest after a prompt: how sure it is of each, not what it happens to write.

A label's score is the log-likelihood of its tokens given the prompt, exactly that of one plain forward of both. A
decoder computes each prompt once for all labels, where its cache can be cut back. It knows no template and no metric.
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
from kitout.kit import Kit
from kitout.runtime.routing.route import adapter_names


def label_likelihoods(
    kit: Kit,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    end_id: int,
    batch_size: int = 32,
    on_progress: ProgressFn | None = None,
) -> Tensor:
    """Log-likelihood of each label (ids) after each prompt (ids), [prompts, labels], wearing what the kit wears.

    end: the id that ends an answer. Where one label begins another ("1", "10") it is scored with every label: else the
    shorter would always win.
    """
    answers = [list(label) for label in labels]
    _check_labels(answers)
    if any(a is not b and b[: len(a)] == a for a in answers for b in answers):
        answers = [[*a, end_id] for a in answers]
    ask = (
        _encoder_decoder_scorer(kit, answers, end_id)
        if kit.config.is_encoder_decoder
        else _decoder_scorer(kit, answers, end_id)
    )
    with eval_mode(kit.base, kit):
        rows = map_batches(prompts, batch_size, ask, on_progress)
    return torch.stack(rows) if rows else torch.zeros(0, len(answers))


def _check_labels(answers: Sequence[Sequence[int]]) -> None:
    faults = Errors(ConfigError, "labels")
    if len(answers) < 2:
        faults.add(f"{len(answers)} given, expected at least 2 to choose from")
    faults.messages += [f"number {i} has no token" for i, answer in enumerate(answers) if not answer]
    same = [i for i, answer in enumerate(answers) if answer in answers[:i]]
    faults.messages += [f"number {i} is the same tokens as an earlier one: {answers[i]}" for i in same]
    faults.raise_if_any()


def _decoder_scorer(kit: Kit, answers: list[list[int]], pad_token_id: int) -> Any:
    takes = inspect.signature(kit.base.forward).parameters
    placed = "position_ids" in takes and not _has_virtual_tokens(kit)

    def ask(prompts: list[Sequence[int]]) -> list[Tensor]:
        ids, mask = pad(prompts, pad_token_id, "left", kit.device)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        options: dict[str, Any] = {"position_ids": places} if placed else {}
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=kit.device)
        out = kit(input_ids=ids, attention_mask=mask, use_cache=max(map(len, answers)) > 1, **options)
        first = _log_probs(out.logits[:, -1])
        columns = []
        for answer in answers:
            if len(answer) > 1 and not _can_crop(out.past_key_values):
                columns.append(_score_uncached(kit, prompts, answer, pad_token_id, placed))
                continue
            score = first[:, answer[0]]
            if len(answer) > 1:
                score = score + _score_rest(kit, mask, places if placed else None, out.past_key_values, answer)
            columns.append(score)
        return list(torch.stack(columns, dim=1).cpu())

    return ask


def _has_virtual_tokens(kit: Kit) -> bool:
    """Whether a prompt or prefix is worn: it moves the text's positions, unless a caller gives them."""
    return any(site.port in ("tokens", "kv") for name in adapter_names(kit.active) for site in kit[name].sites)


def _can_crop(cache: Any) -> bool:
    """Whether a cache can forget its last tokens: one of states or of a window cannot."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _score_rest(kit: Kit, mask: Tensor, position_ids: Tensor | None, cache: Any, answer: list[int]) -> Tensor:
    """Log-likelihood of an answer's second to last token, on the prompt's cache, which is left as it was."""
    ids = torch.tensor([answer[:-1]] * len(mask), device=kit.device)
    positions = {}
    if position_ids is not None:
        positions = {"position_ids": position_ids[:, -1:] + torch.arange(1, len(answer), device=kit.device)}
    seen = torch.cat((mask, torch.ones_like(ids)), dim=1)
    out = kit(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True, **positions)
    cache.crop(1 - len(answer))  # negative: how many to remove
    return _sum_log_probs(out.logits, answer[1:])


def _score_uncached(
    kit: Kit, prompts: list[Sequence[int]], answer: list[int], pad_token_id: int, with_position_ids: bool
) -> Tensor:
    """Log-likelihood of a whole answer by a forward of its own."""
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
            read = torch.tensor([[start, *answer[:-1]]] * len(prompts), device=kit.device)
            out = kit(input_ids=ids, attention_mask=mask, decoder_input_ids=read, use_cache=False)
            columns.append(_sum_log_probs(out.logits, answer))
        return list(torch.stack(columns, dim=1).cpu())

    return ask


def _sum_log_probs(logits: Tensor, answer: list[int]) -> Tensor:
    """Log-likelihood of ids, summed; logits [B, T, V] foresee them one by one."""
    wanted = torch.tensor(answer, device=logits.device).expand(len(logits), -1)
    return _log_probs(logits).gather(2, wanted[..., None]).sum(dim=(1, 2))


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1)
