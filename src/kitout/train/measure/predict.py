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

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.evaluate.ask.generate import generate as generated
from kitout.evaluate.ask.label_likelihood import label_likelihoods
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import compute_measures
from kitout.kit import Kit
from kitout.train.loop.distributed import all_gather, my_slice
from kitout.train.loop.fsdp import is_sharded
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Batch, Losses, Objective
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import predictions_from_logits
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_ids

MAX_BATCH_TOKENS = (
    4096  # of one batch, padding included: an evaluation holds no more than a training step of usual size
)
MAX_BATCH_ROWS = 64
MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 24, 256  # tokens of an answer at least and at most, unless said otherwise

ProgressFn = Callable[[int, int], None]


@dataclass
class Predictions:
    """What a model makes of examples, in their order."""

    losses: list[LossSums] = field(default_factory=list)
    """The summed loss."""
    predictions: list[Any] = field(default_factory=list)
    """What the objective predicts; None where it is text."""
    texts: list[str] = field(default_factory=list)
    """The answer that is written."""
    likeliest_answers: list[str] = field(default_factory=list)
    """The likeliest answer, where answers are a closed set."""

    @property
    def mean_loss(self) -> float:
        """Per term."""
        return sum(s.loss for s in self.losses) / max(1, sum(s.num_tokens for s in self.losses))


@torch.no_grad()
def predict(
    kit: Kit,
    objective: Objective,
    items: Sequence[Any],
    on_progress: ProgressFn | None = None,
    closed_answers: ClosedAnswers | None = None,
) -> Predictions:
    """Losses and predictions of what is active in the kit. answers: the likeliest of these, too."""
    if closed_answers is not None and not _fits_one_forward(objective, closed_answers, items):
        seen = predict(kit, objective, items, on_progress)
        seen.likeliest_answers = choose_answers(kit, closed_answers, items, on_progress)
        return seen
    batches = _plan_batches(objective, items, my_slice(range(len(items))))
    here: list[tuple[int, LossSums, Any]] = []
    done = 0
    for rows in batches:
        if on_progress:
            on_progress(done, sum(map(len, batches)))
        here += _predict_batch(kit, objective, items, rows, closed_answers)
        done += len(rows)
    if is_sharded(kit):  # a forward is one of all processes: the others may have more of them
        for _ in range(max(all_gather([len(batches)])) - len(batches)):
            _predict_batch(kit, objective, items, batches[0] if batches else [0], closed_answers)
    whole = sorted(all_gather(here), key=lambda entry: entry[0])
    summed, guesses = [summed for _, summed, _ in whole], [guess for _, _, guess in whole]
    return (
        Predictions(summed, guesses)
        if closed_answers is None
        else Predictions(summed, likeliest_answers=[closed_answers.names[k] for k in guesses])
    )


def _plan_batches(objective: Objective, items: Sequence[Any], rows: Sequence[int]) -> list[list[int]]:
    """Of like lengths, the longest first, so that memory is known to suffice early."""
    order = sorted(rows, key=lambda i: -objective.num_tokens(items[i]))
    cut: list[list[int]] = []
    at = 0
    while at < len(order):
        most = max(1, min(MAX_BATCH_ROWS, MAX_BATCH_TOKENS // max(1, objective.num_tokens(items[order[at]]))))
        cut.append(order[at : at + most])
        at += most
    return cut


def _predict_batch(
    kit: Kit, objective: Objective, items: Sequence[Any], rows: list[int], closed_answers: ClosedAnswers | None
) -> list[tuple[int, LossSums, Any]]:  # fmt: skip
    batch = objective.collate([items[i] for i in rows], None)
    if closed_answers is not None and isinstance(objective, CausalLM | Seq2SeqLM):
        losses, guessed = _losses_and_answers(kit, objective, batch, closed_answers)
    else:
        losses = objective.losses(kit, batch, torch.ones(len(rows), device=kit.device))
        if losses.logits is not None:
            guessed = predictions_from_logits(objective.task, losses.logits.float())
        else:
            guessed = objective.predictions(kit, batch) or [None] * len(rows)
    counted = zip(losses.per_example.tolist(), losses.num_targets.tolist(), losses.num_correct.tolist(), strict=True)
    return [(i, LossSums(a, int(b), int(c)), g) for i, (a, b, c), g in zip(rows, counted, guessed, strict=True)]


def _fits_one_forward(objective: Objective, closed_answers: ClosedAnswers, items: Sequence[EncodedExample]) -> bool:
    """Whether the first learned position tells the answers apart: each is one token, and nothing is learned before."""
    alone = all(label == IGNORE_INDEX for item in items for label in item.labels[: item.prompt_length])
    return (
        isinstance(objective, CausalLM | Seq2SeqLM) and alone and all(len(ids) == 1 for ids in closed_answers.token_ids)
    )


def _losses_and_answers(
    kit: Kit, objective: CausalLM | Seq2SeqLM, batch: Batch, closed_answers: ClosedAnswers
) -> tuple[Losses, list[int]]:  # fmt: skip
    """Losses and the number of the likeliest answer of each example, from the same logits."""
    gold = batch.targets
    owners, labels = gold["owners"], gold["labels"]
    logits = at_least_float32(objective.head.logits(lambda: kit(**batch.inputs), gold["places"]))
    nll = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(dim=-1) == labels).to(nll.dtype)
    zeros = torch.zeros(batch.num_examples, dtype=nll.dtype, device=nll.device)
    sums = [zeros.index_add(0, owners, value) for value in (nll, right, torch.ones_like(nll))]
    listed = owners.tolist()
    first = logits[[listed.index(row) for row in range(batch.num_examples)]]
    tokens = torch.tensor([ids[0] for ids in closed_answers.token_ids], device=logits.device)
    return Losses(nll.sum(), *sums), first[:, tokens].argmax(dim=1).tolist()


def generate_answers(
    kit: Kit,
    tokenizer: Any,
    items: Sequence[EncodedExample],
    max_new_tokens: int | None,
    on_progress: ProgressFn | None = None,
) -> list[str]:
    """The answers the model writes to the examples' prompts, greedily. longest: in tokens; None: as the right ones ask.

    With a base that is parted among processes every token is written by all of them, so each answers everything.
    """
    together = is_sharded(kit)
    own = list(range(len(items))) if together else my_slice(range(len(items)))
    prompts = [prompt_ids(items[i]) for i in own]
    most = max_new_tokens or _default_max_new_tokens(items)
    here = list(zip(own, generated(kit, tokenizer, prompts, most, on_progress=on_progress), strict=True)) if own else []
    return [text for _, text in sorted(here if together else all_gather(here))]


def choose_answers(
    kit: Kit, closed_answers: ClosedAnswers, items: Sequence[EncodedExample], on_progress: ProgressFn | None = None
) -> list[str]:  # fmt: skip
    """The likeliest answer of the closed set to each example's prompt, with what is active in the kit."""
    together = is_sharded(kit)
    own = list(range(len(items))) if together else my_slice(range(len(items)))
    scores = label_likelihoods(
        kit,
        [prompt_ids(items[i]) for i in own],
        closed_answers.token_ids,
        closed_answers.end_token_id,
        on_progress=on_progress,
    )
    here = [(i, closed_answers.names[best]) for i, best in zip(own, scores.argmax(dim=1).tolist(), strict=True)]
    return [name for _, name in sorted(here if together else all_gather(here))]


def _default_max_new_tokens(items: Sequence[EncodedExample]) -> int:
    """Twice the longest right answer, at most LONGEST; room enough for a base that says it in a sentence."""
    right = max(len(item.input_ids) - item.prompt_length if item.labels else len(item.target_ids) for item in items)
    return min(MAX_ANSWER_TOKENS, max(MIN_ANSWER_TOKENS, 2 * right))


def compute_metrics(
    objective: Objective,
    items: Sequence[Any],
    predictions: Predictions,
    reference_of: Callable[[Any], Any],
    label_names: Sequence[str] = (),
) -> dict[str, Measure]:
    """The metrics of the objective's task over what was seen; loss and token accuracy for texts as well."""
    language = compute_measures("language", predictions.losses)
    if objective.task != "generation":
        true = [reference_of(item) for item in items]
        return compute_measures(objective.task, predictions.predictions, true, names=label_names or None) | {
            "loss": language["loss"]
        }
    if predictions.likeliest_answers:
        return (
            compute_measures("classification", predictions.likeliest_answers, [item.reference for item in items])
            | language
        )
    if not predictions.texts:
        return language
    told = [item.reference for item in items if item.reference][: len(predictions.texts)]
    return compute_measures("generation", predictions.texts, told) | language
