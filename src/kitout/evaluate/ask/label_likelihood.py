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
from kitout.errors import ConfigError, Faults
from kitout.evaluate.ask.batches import Tell, in_batches
from kitout.kit import Kit
from kitout.runtime.routing.route import names


def likelihoods(
    kit: Kit,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    end: int,
    batch: int = 32,
    tell: Tell | None = None,
) -> Tensor:
    """Log-likelihood of each label (ids) after each prompt (ids), [prompts, labels], wearing what the kit wears.

    end: the id that ends an answer. Where one label begins another ("1", "10") it is scored with every label: else the
    shorter would always win.
    """
    answers = [list(label) for label in labels]
    _check(answers)
    if any(a is not b and b[: len(a)] == a for a in answers for b in answers):
        answers = [[*a, end] for a in answers]
    ask = _written_after(kit, answers, end) if kit.config.is_encoder_decoder else _said_after(kit, answers, end)
    with eval_mode(kit.base, kit):
        rows = in_batches(prompts, batch, ask, tell)
    return torch.stack(rows) if rows else torch.zeros(0, len(answers))


def _check(answers: Sequence[Sequence[int]]) -> None:
    faults = Faults(ConfigError, "labels")
    if len(answers) < 2:
        faults.add(f"{len(answers)} given, expected at least 2 to choose from")
    faults.items += [f"number {i} has no token" for i, answer in enumerate(answers) if not answer]
    same = [i for i, answer in enumerate(answers) if answer in answers[:i]]
    faults.items += [f"number {i} is the same tokens as an earlier one: {answers[i]}" for i in same]
    faults.raise_if_any()


def _said_after(kit: Kit, answers: list[list[int]], filler: int) -> Any:
    takes = inspect.signature(kit.base.forward).parameters
    placed = "position_ids" in takes and not _leads(kit)

    def ask(prompts: list[Sequence[int]]) -> list[Tensor]:
        ids, mask = pad(prompts, filler, "left", kit.device)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        options: dict[str, Any] = {"position_ids": places} if placed else {}
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=kit.device)
        out = kit(input_ids=ids, attention_mask=mask, use_cache=max(map(len, answers)) > 1, **options)
        first = _sure(out.logits[:, -1])
        columns = []
        for answer in answers:
            if len(answer) > 1 and not _cut_back(out.past_key_values):
                columns.append(_afresh(kit, prompts, answer, filler, placed))
                continue
            score = first[:, answer[0]]
            if len(answer) > 1:
                score = score + _rest(kit, mask, places if placed else None, out.past_key_values, answer)
            columns.append(score)
        return list(torch.stack(columns, dim=1).cpu())

    return ask


def _leads(kit: Kit) -> bool:
    """Whether a prompt or prefix is worn: it moves the text's positions, unless a caller gives them."""
    return any(site.port in ("tokens", "kv") for name in names(kit.active) for site in kit[name].sites)


def _cut_back(cache: Any) -> bool:
    """Whether a cache can forget its last tokens: one of states or of a window cannot."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _rest(kit: Kit, mask: Tensor, places: Tensor | None, cache: Any, answer: list[int]) -> Tensor:
    """Log-likelihood of an answer's second to last token, on the prompt's cache, which is left as it was."""
    ids = torch.tensor([answer[:-1]] * len(mask), device=kit.device)
    positions = {}
    if places is not None:
        positions = {"position_ids": places[:, -1:] + torch.arange(1, len(answer), device=kit.device)}
    seen = torch.cat((mask, torch.ones_like(ids)), dim=1)
    out = kit(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True, **positions)
    cache.crop(1 - len(answer))  # negative: how many to remove
    return _of(out.logits, answer[1:])


def _afresh(kit: Kit, prompts: list[Sequence[int]], answer: list[int], filler: int, placed: bool) -> Tensor:
    """Log-likelihood of a whole answer by a forward of its own."""
    ids, mask = pad([[*prompt, *answer[:-1]] for prompt in prompts], filler, "left", kit.device)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if placed else {}
    out = kit(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    return _of(out.logits[:, -len(answer) :], answer)


def _written_after(kit: Kit, answers: list[list[int]], filler: int) -> Any:
    start = kit.config.decoder_start_token_id

    def ask(prompts: list[Sequence[int]]) -> list[Tensor]:
        ids, mask = pad(prompts, filler, "right", kit.device)
        columns = []
        for answer in answers:
            read = torch.tensor([[start, *answer[:-1]]] * len(prompts), device=kit.device)
            out = kit(input_ids=ids, attention_mask=mask, decoder_input_ids=read, use_cache=False)
            columns.append(_of(out.logits, answer))
        return list(torch.stack(columns, dim=1).cpu())

    return ask


def _of(logits: Tensor, answer: list[int]) -> Tensor:
    """Log-likelihood of ids, summed; logits [B, T, V] foresee them one by one."""
    wanted = torch.tensor(answer, device=logits.device).expand(len(logits), -1)
    return _sure(logits).gather(2, wanted[..., None]).sum(dim=(1, 2))


def _sure(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1)
