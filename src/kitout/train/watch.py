"""What a model makes of a set of examples, batch by batch: summed losses, predictions, written answers, and scores.

Nothing as large as logits outlives its batch. With several processes each takes its share, and all come to the same
figures. It knows objectives and metrics, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kitout.evaluate.generate import answers
from kitout.evaluate.language import Summed
from kitout.evaluate.measure import Measure
from kitout.evaluate.metrics import measures
from kitout.kit.kit import Kit
from kitout.train.objective import Objective
from kitout.train.processes import gathered, mine

TOKENS = 4096  # of one batch, padding included: an evaluation holds no more than a training step of usual size
ROWS = 64

Tell = Callable[[int, int], None]


@dataclass
class Seen:
    """Of each example, in order: its summed loss, its prediction (None where it is text), and the answer written."""

    summed: list[Summed] = field(default_factory=list)
    predictions: list[Any] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Per term."""
        return sum(s.loss for s in self.summed) / max(1, sum(s.tokens for s in self.summed))


@torch.no_grad()
def see(kit: Kit, objective: Objective, items: Sequence[Any], tell: Tell | None = None) -> Seen:
    """Losses and predictions of what the kit wears now."""
    order = sorted(mine(range(len(items))), key=lambda i: -objective.size(items[i]))
    here: list[tuple[int, Summed, Any]] = []
    at = 0
    while at < len(order):
        most = max(1, min(ROWS, TOKENS // max(1, objective.size(items[order[at]]))))
        rows = order[at : at + most]
        if tell:
            tell(at, len(order))
        batch = objective.collate([items[i] for i in rows], None)
        losses = objective.losses(kit, batch, torch.ones(len(rows), device=kit.device))
        guessed = objective.predictions(kit, batch) or [None] * len(rows)
        counted = zip(losses.rows.tolist(), losses.of.tolist(), losses.right.tolist(), strict=True)
        here += [(i, Summed(a, int(b), int(c)), g) for i, (a, b, c), g in zip(rows, counted, guessed, strict=True)]
        at += most
    whole = sorted(gathered(here), key=lambda entry: entry[0])
    return Seen([summed for _, summed, _ in whole], [guess for _, _, guess in whole])


def write(kit: Kit, tokenizer: Any, items: Sequence[Any], longest: int, tell: Tell | None = None) -> list[str]:
    """The answers the model writes to the examples' prompts, greedily."""
    own = mine(range(len(items)))
    prompts = [items[i].ids[: items[i].prompt] if items[i].labels else items[i].ids for i in own]
    here = list(zip(own, answers(kit, tokenizer, prompts, longest, tell=tell), strict=True)) if own else []
    return [text for _, text in sorted(gathered(here))]


def scores(objective: Objective, items: Sequence[Any], seen: Seen, gold: Callable[[Any], Any]) -> dict[str, Measure]:
    """The metrics of the objective's task over what was seen; loss and token accuracy for texts as well."""
    language = measures("language", seen.summed)
    if objective.task != "generation":
        return measures(objective.task, seen.predictions, [gold(item) for item in items]) | {"loss": language["loss"]}
    if not seen.written:
        return language
    told = items[: len(seen.written)]
    return measures("generation", seen.written, [item.reference for item in told]) | language
