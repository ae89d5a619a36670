"""What a model makes of a set of examples, batch by batch: summed losses, predictions, written answers, and scores.

Nothing as large as logits outlives its batch. With several processes each takes its share, and all come to the same
figures. It knows objectives and metrics, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from kitout.data.encode.item import IGNORED, Item
from kitout.evaluate.ask.generate import answers as generated
from kitout.evaluate.ask.label_likelihood import likelihoods
from kitout.evaluate.metrics.language import Summed
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import measures
from kitout.kit import Kit
from kitout.train.loop.distributed import gathered, mine
from kitout.train.loop.fsdp import sharded
from kitout.train.objectives.batch import Batch
from kitout.train.objectives.causal_lm import Causal
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Losses, Objective
from kitout.train.objectives.seq2seq_lm import Seq2Seq
from kitout.train.objectives.sequence import read_off
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_of

TOKENS = 4096  # of one batch, padding included: an evaluation holds no more than a training step of usual size
ROWS = 64
SENTENCE, LONGEST = 24, 256  # tokens of an answer at least and at most, unless said otherwise

Tell = Callable[[int, int], None]


@dataclass
class Seen:
    """What a model makes of examples, in their order."""

    summed: list[Summed] = field(default_factory=list)
    """The summed loss."""
    predictions: list[Any] = field(default_factory=list)
    """What the objective predicts; None where it is text."""
    written: list[str] = field(default_factory=list)
    """The answer that is written."""
    likeliest: list[str] = field(default_factory=list)
    """The likeliest answer, where answers are a closed set."""

    @property
    def loss(self) -> float:
        """Per term."""
        return sum(s.loss for s in self.summed) / max(1, sum(s.tokens for s in self.summed))


@torch.no_grad()
def see(
    kit: Kit, objective: Objective, items: Sequence[Any], tell: Tell | None = None, answers: ClosedAnswers | None = None
) -> Seen:  # fmt: skip
    """Losses and predictions of what is active in the kit. answers: the likeliest of these, too."""
    if answers is not None and not _in_one_forward(objective, answers, items):
        seen = see(kit, objective, items, tell)
        seen.likeliest = choose(kit, answers, items, tell)
        return seen
    batches = _batches(objective, items, mine(range(len(items))))
    here: list[tuple[int, Summed, Any]] = []
    done = 0
    for rows in batches:
        if tell:
            tell(done, sum(map(len, batches)))
        here += _seen(kit, objective, items, rows, answers)
        done += len(rows)
    if sharded(kit):  # a forward is one of all processes: the others may have more of them
        for _ in range(max(gathered([len(batches)])) - len(batches)):
            _seen(kit, objective, items, batches[0] if batches else [0], answers)
    whole = sorted(gathered(here), key=lambda entry: entry[0])
    summed, guesses = [summed for _, summed, _ in whole], [guess for _, _, guess in whole]
    return Seen(summed, guesses) if answers is None else Seen(summed, likeliest=[answers.names[k] for k in guesses])


def _batches(objective: Objective, items: Sequence[Any], rows: Sequence[int]) -> list[list[int]]:
    """Of like lengths, the longest first, so that memory is known to suffice early."""
    order = sorted(rows, key=lambda i: -objective.size(items[i]))
    cut: list[list[int]] = []
    at = 0
    while at < len(order):
        most = max(1, min(ROWS, TOKENS // max(1, objective.size(items[order[at]]))))
        cut.append(order[at : at + most])
        at += most
    return cut


def _seen(
    kit: Kit, objective: Objective, items: Sequence[Any], rows: list[int], answers: ClosedAnswers | None
) -> list[tuple[int, Summed, Any]]:  # fmt: skip
    batch = objective.collate([items[i] for i in rows], None)
    if answers is not None and isinstance(objective, Causal | Seq2Seq):
        losses, guessed = _with_answers(kit, objective, batch, answers)
    else:
        losses = objective.losses(kit, batch, torch.ones(len(rows), device=kit.device))
        if losses.logits is not None:
            guessed = read_off(objective.task, losses.logits.float())
        else:
            guessed = objective.predictions(kit, batch) or [None] * len(rows)
    counted = zip(losses.rows.tolist(), losses.of.tolist(), losses.right.tolist(), strict=True)
    return [(i, Summed(a, int(b), int(c)), g) for i, (a, b, c), g in zip(rows, counted, guessed, strict=True)]


def _in_one_forward(objective: Objective, answers: ClosedAnswers, items: Sequence[Item]) -> bool:
    """Whether the first learned position tells the answers apart: each is one token, and nothing is learned before."""
    alone = all(label == IGNORED for item in items for label in item.labels[: item.prompt])
    return isinstance(objective, Causal | Seq2Seq) and alone and all(len(ids) == 1 for ids in answers.ids)


def _with_answers(
    kit: Kit, objective: Causal | Seq2Seq, batch: Batch, answers: ClosedAnswers
) -> tuple[Losses, list[int]]:  # fmt: skip
    """Losses and the number of the likeliest answer of each example, from the same logits."""
    gold = batch.gold
    owners, labels = gold["owners"], gold["labels"]
    logits = at_least_float32(objective.head.logits(lambda: kit(**batch.inputs), gold["places"]))
    nll = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(dim=-1) == labels).to(nll.dtype)
    zeros = torch.zeros(batch.rows, dtype=nll.dtype, device=nll.device)
    sums = [zeros.index_add(0, owners, value) for value in (nll, right, torch.ones_like(nll))]
    listed = owners.tolist()
    first = logits[[listed.index(row) for row in range(batch.rows)]]
    tokens = torch.tensor([ids[0] for ids in answers.ids], device=logits.device)
    return Losses(nll.sum(), *sums), first[:, tokens].argmax(dim=1).tolist()


def write(
    kit: Kit, tokenizer: Any, items: Sequence[Item], longest: int | None, tell: Tell | None = None
) -> list[str]:  # fmt: skip
    """The answers the model writes to the examples' prompts, greedily. longest: in tokens; None: as the right ones ask.

    With a base that is parted among processes every token is written by all of them, so each answers everything.
    """
    together = sharded(kit)
    own = list(range(len(items))) if together else mine(range(len(items)))
    prompts = [prompt_of(items[i]) for i in own]
    most = longest or _usual(items)
    here = list(zip(own, generated(kit, tokenizer, prompts, most, tell=tell), strict=True)) if own else []
    return [text for _, text in sorted(here if together else gathered(here))]


def choose(
    kit: Kit, answers: ClosedAnswers, items: Sequence[Item], tell: Tell | None = None
) -> list[str]:  # fmt: skip
    """The likeliest answer of the closed set to each example's prompt, with what is active in the kit."""
    together = sharded(kit)
    own = list(range(len(items))) if together else mine(range(len(items)))
    scores = likelihoods(kit, [prompt_of(items[i]) for i in own], answers.ids, answers.end, tell=tell)
    here = [(i, answers.names[best]) for i, best in zip(own, scores.argmax(dim=1).tolist(), strict=True)]
    return [name for _, name in sorted(here if together else gathered(here))]


def _usual(items: Sequence[Item]) -> int:
    """Twice the longest right answer, at most LONGEST; room enough for a base that says it in a sentence."""
    right = max(len(item.ids) - item.prompt if item.labels else len(item.target) for item in items)
    return min(LONGEST, max(SENTENCE, 2 * right))


def scores(
    objective: Objective, items: Sequence[Any], seen: Seen, gold: Callable[[Any], Any], names: Sequence[str] = ()
) -> dict[str, Measure]:  # fmt: skip
    """The metrics of the objective's task over what was seen; loss and token accuracy for texts as well."""
    language = measures("language", seen.summed)
    if objective.task != "generation":
        true = [gold(item) for item in items]
        return measures(objective.task, seen.predictions, true, names=names or None) | {"loss": language["loss"]}
    if seen.likeliest:
        return measures("classification", seen.likeliest, [item.reference for item in items]) | language
    if not seen.written:
        return language
    told = [item.reference for item in items if item.reference][: len(seen.written)]
    return measures("generation", seen.written, told) | language
