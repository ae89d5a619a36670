"""What a model makes of texts: the likelihood it gives each label, the answers it writes, and how sure a count is.

A label's score is the log-likelihood of its tokens given the prompt; the prompt is computed once for all labels. The
interval is Wilson's (1927), which stays honest near 0 and 1 and for few texts. It knows no training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitout import Kit
from kitout.demo.data import Example
from kitout.demo.screen import Tell
from kitout.demo.task import Task, pad

Z95 = 1.959964


@dataclass(frozen=True)
class Measured:
    """Labels chosen for the texts, in their order, and what that cost."""

    chosen: list[str]
    right: int
    balanced: float  # mean over labels of the share of its texts that were recognised
    seconds: float
    tokens: int

    @property
    def accuracy(self) -> float:
        return self.right / len(self.chosen)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, len(self.chosen))


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is no share")
    p, z2 = right / total, Z95**2 / total
    middle, reach = p + z2 / 2, Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return max(0.0, (middle - reach) / (1 + z2)), min(1.0, (middle + reach) / (1 + z2))


def measure(kit: Kit, task: Task, examples: Sequence[Example], tell: Tell, batch: int = 32) -> Measured:
    """Chooses the likeliest label of each text under what the kit wears now."""
    start = time.perf_counter()
    prompts = [task.encode(e.text) for e in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chosen = [""] * len(prompts)
    for at in range(0, len(order), batch):
        tell(at, len(order), "")
        rows = order[at : at + batch]
        best = label_scores(kit, task, [prompts[i] for i in rows]).argmax(dim=1).tolist()
        for row, label in zip(rows, best, strict=True):
            chosen[row] = task.labels[label]
    tell(len(order), len(order), "")
    right = [guess == e.label for guess, e in zip(chosen, examples, strict=True)]
    shares = [[r for r, e in zip(right, examples, strict=True) if e.label == label] for label in task.labels]
    balanced = [sum(share) / len(share) for share in shares if share]
    seconds = time.perf_counter() - start
    return Measured(chosen, sum(right), sum(balanced) / len(balanced), seconds, sum(map(len, prompts)))


@torch.no_grad()
def label_scores(kit: Kit, task: Task, prompts: Sequence[list[int]]) -> Tensor:
    """Log-likelihood of each label after each prompt, [prompts, labels]."""
    answers = task.answers
    if any(a != b and b[: len(a)] == a for a in answers for b in answers):
        answers = [[*a, task.end] for a in answers]  # else "1" would always beat "10"
    batch = pad(prompts, task.end, kit.device)
    longer = max(map(len, answers)) > 1
    last = torch.tensor([batch["input_ids"].shape[1] - 1], device=kit.device)
    out = kit(**batch, logits_to_keep=last, use_cache=longer)
    first = out.logits[:, -1].float().log_softmax(dim=-1)
    columns = []
    for answer in answers:
        score = first[:, answer[0]]
        if len(answer) > 1:
            score = score + _rest(kit, batch, out.past_key_values, answer)
        columns.append(score)
    return torch.stack(columns, dim=1)


def _rest(kit: Kit, batch: dict[str, Tensor], cache: Any, answer: list[int]) -> Tensor:
    """Log-likelihood of an answer's second to last token, on the prompt's cache, which is left as it was."""
    rows = len(batch["input_ids"])
    ids = torch.tensor([answer[:-1]] * rows, device=kit.device)
    mask = torch.cat((batch["attention_mask"], torch.ones_like(ids)), dim=1)
    positions = batch["position_ids"][:, -1:] + torch.arange(1, len(answer), device=kit.device)
    out = kit(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    cache.crop(1 - len(answer))  # negative: how many to remove
    targets = torch.tensor(answer[1:], device=kit.device).expand(rows, -1)
    return out.logits.float().log_softmax(dim=-1).gather(2, targets[..., None]).sum(dim=(1, 2))


@torch.no_grad()
def write(kit: Kit, task: Task, texts: Sequence[str], longest: int = 12) -> list[str]:
    """What the model itself writes, greedily, one line per text."""
    batch = pad([task.encode(text) for text in texts], task.end, kit.device)
    width = batch["input_ids"].shape[1]
    out = kit.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=longest, do_sample=False,
        pad_token_id=task.end, eos_token_id=task.end,
    )  # fmt: skip
    said = task.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [" ".join(words.split()) for words in said]
