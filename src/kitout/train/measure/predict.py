"""A model's predictions on a list of examples, batch by batch: losses, predictions, generated answers; and metrics.

Nothing as large as logits outlives its batch. Several processes divide the examples, and all get the same metrics. It
knows objectives and metrics, and nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from kitout.data.by_row import sum_by_row
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.evaluate.ask.generate import generate, generate_under
from kitout.evaluate.ask.label_likelihood import label_likelihoods
from kitout.evaluate.ask.text_limit import max_tokens
from kitout.evaluate.metrics.language import LossSums
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import Task, compute_measures
from kitout.kit import Kit
from kitout.route import RouteEntry
from kitout.train.loop.distributed import all_gather, my_slice
from kitout.train.loop.fsdp import is_sharded
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.objective import Batch, Losses, Objective
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import predictions_from_logits
from kitout.train.setup.closed_answers import ClosedAnswers, prompt_ids
from kitout.train.trunk.kept_inputs import within_trunk

MAX_BATCH_TOKENS = 2048  # padding included; more only add padding, and memory beyond a training step's
MAX_BATCH_ROWS = 64
MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 24, 256  # bounds of the default max_new_tokens

ProgressFn = Callable[[int, int], None]  # (examples done, examples in all)


@dataclass
class Predictions:
    """A model's predictions, in the order of the examples."""

    losses: list[LossSums] = field(default_factory=list)
    """Each example's summed loss and its targets."""
    predictions: list[Any] = field(default_factory=list)
    """What the objective predicts: a class, a number, classes of tokens; None where it is text."""
    texts: list[str] = field(default_factory=list)
    """Generated answers, of the first examples with a reference."""
    likeliest_answers: list[str] = field(default_factory=list)
    """The likeliest answer each, where answers are a closed set."""

    @property
    def mean_loss(self) -> float:
        """Per target."""
        return sum(s.loss for s in self.losses) / max(1, sum(s.num_tokens for s in self.losses))


@torch.no_grad()
def predict(
    kit: Kit,
    objective: Objective,
    items: Sequence[Any],
    on_progress: ProgressFn | None = None,
    closed_answers: ClosedAnswers | None = None,
) -> Predictions:
    """Losses and predictions with the active adapter. closed_answers: the likeliest of these, too."""
    if closed_answers is not None and not _fits_one_forward(objective, closed_answers, items):
        predictions = predict(kit, objective, items, on_progress)
        predictions.likeliest_answers = choose_answers(kit, closed_answers, items, on_progress)
        return predictions
    batches = plan_forwards(objective, items, my_slice(range(len(items))))
    results: list[tuple[int, LossSums, Any]] = []
    done = 0
    for rows in batches:
        if on_progress:
            on_progress(done, sum(map(len, batches)))
        results += _predict_batch(kit, objective, items, rows, closed_answers)
        done += len(rows)
    if is_sharded(kit):  # all processes run each forward together, and another may have more of them
        for _ in range(max(all_gather([len(batches)])) - len(batches)):
            _predict_batch(kit, objective, items, batches[0] if batches else [0], closed_answers)
    results = sorted(all_gather(results), key=lambda result: result[0])
    losses, predicted = [sums for _, sums, _ in results], [prediction for _, _, prediction in results]
    if closed_answers is None:
        return Predictions(losses, predicted)
    return Predictions(losses, likeliest_answers=[closed_answers.names[k] for k in predicted])


def plan_forwards(
    objective: Objective, items: Sequence[Any], rows: Sequence[int], max_rows: int | None = None
) -> list[list[int]]:
    """Batches of like lengths, the longest first, so that a lack of memory shows early. max_rows: examples of one."""
    lengths = [objective.num_tokens(items[i]) for i in rows]
    plan = plan_lengths(lengths, max_rows or MAX_BATCH_ROWS // objective.rows)
    return [[rows[i] for i in batch] for batch in plan]


def plan_lengths(lengths: Sequence[int], max_rows: int = MAX_BATCH_ROWS) -> list[list[int]]:
    """The same of rows of these many tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = max(1, min(max_rows, MAX_BATCH_TOKENS // max(1, lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def _predict_batch(
    kit: Kit, objective: Objective, items: Sequence[Any], rows: list[int], closed_answers: ClosedAnswers | None
) -> list[tuple[int, LossSums, Any]]:  # fmt: skip
    batch_items = [items[i] for i in rows]
    batch = objective.collate(batch_items, None)
    if isinstance(objective, CausalLM):
        batch = objective.sharing(batch, batch_items)
    with within_trunk(kit, objective, batch_items, batch):
        if closed_answers is not None and isinstance(objective, CausalLM | Seq2SeqLM):
            losses, predicted = _losses_and_answers(kit, objective, batch, closed_answers)
        else:
            losses = objective.losses(kit, batch, torch.ones(len(rows), device=kit.device))
            if losses.logits is not None:
                predicted = predictions_from_logits(objective.task, losses.logits.float())
            elif losses.rewards is not None:
                predicted = losses.rewards.tolist()
            else:
                predicted = objective.predictions(kit, batch) or [None] * len(rows)
    sums = [
        LossSums(loss, int(targets), int(correct))
        for loss, targets, correct in zip(
            losses.per_example.tolist(), losses.num_targets.tolist(), losses.num_correct.tolist(), strict=True
        )
    ]
    return list(zip(rows, sums, predicted, strict=True))


def _fits_one_forward(objective: Objective, closed_answers: ClosedAnswers, items: Sequence[EncodedExample]) -> bool:
    """Whether the first target position decides the answer: each answer is one token, no target is in the prompt."""
    is_one_token = all(len(ids) == 1 for ids in closed_answers.token_ids)
    in_answer = all(label == IGNORE_INDEX for item in items for label in item.labels[: item.prompt_length])
    return isinstance(objective, CausalLM | Seq2SeqLM) and is_one_token and in_answer


def _losses_and_answers(
    kit: Kit, objective: CausalLM | Seq2SeqLM, batch: Batch, closed_answers: ClosedAnswers
) -> tuple[Losses, list[int]]:  # fmt: skip
    """Losses, and the index of each example's likeliest answer, from the same logits."""
    labels, owners = (batch.targets[name] for name in ("labels", "owners"))
    logits = at_least_float32(objective.target_logits(kit, batch))
    nll = F.cross_entropy(logits, labels, reduction="none")
    is_correct = (logits.argmax(dim=-1) == labels).to(nll.dtype)
    each = (nll, is_correct, torch.ones_like(nll))
    sums = [sum_by_row(value, owners, batch.num_examples) for value in each]
    rows = owners.tolist()
    first = logits[[rows.index(row) for row in range(batch.num_examples)]]
    tokens = torch.tensor([ids[0] for ids in closed_answers.token_ids], device=logits.device)
    return Losses(nll.sum(), *sums), first[:, tokens].argmax(dim=1).tolist()


def generate_answers_under(
    kit: Kit,
    tokenizer: Any,
    items: Sequence[EncodedExample],
    routes: Sequence[RouteEntry],
    max_new_tokens: int | None,
    on_progress: ProgressFn | None = None,
) -> list[list[str]]:
    """By route what `generate_answers` gives in one process, all routes as rows of the same batches."""
    prompts, longest = [prompt_ids(item) for item in items], max_new_tokens or default_max_new_tokens(items)
    stop_ids = _trained_ends(tokenizer, items)
    return generate_under(kit, tokenizer, prompts, longest, routes, on_progress=on_progress, stop_ids=stop_ids)


def generate_answers(
    kit: Kit,
    tokenizer: Any,
    items: Sequence[EncodedExample],
    max_new_tokens: int | None,
    on_progress: ProgressFn | None = None,
) -> list[str]:
    """The answers to the examples' prompts, by greedy decoding. max_new_tokens: None: by the references' lengths.

    All processes generate each token of a sharded base together, so then each of them answers every prompt.
    """
    is_together = is_sharded(kit)
    own = list(range(len(items))) if is_together else my_slice(range(len(items)))
    texts: list[tuple[int, str]] = []
    if own:
        prompts = [prompt_ids(items[i]) for i in own]
        longest = max_new_tokens or default_max_new_tokens(items)
        stop_ids = _trained_ends(tokenizer, items)
        answers = generate(kit, tokenizer, prompts, longest, on_progress=on_progress, stop_ids=stop_ids)
        texts = list(zip(own, answers, strict=True))
    return [text for _, text in sorted(texts if is_together else all_gather(texts))]


def _trained_ends(tokenizer: Any, items: Sequence[EncodedExample]) -> list[int]:
    """The special tokens in which trained answers end: a chat template may end a turn with one of its own."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = {(item.target_ids or item.labels)[-1] for item in items if item.target_ids or item.labels}
    return sorted(last & special)


def choose_answers(
    kit: Kit, closed_answers: ClosedAnswers, items: Sequence[EncodedExample], on_progress: ProgressFn | None = None
) -> list[str]:  # fmt: skip
    """The likeliest answer of the closed set to each example's prompt, with the active adapter."""
    is_together = is_sharded(kit)
    own = list(range(len(items))) if is_together else my_slice(range(len(items)))
    scores = answer_likelihoods(kit, closed_answers, [prompt_ids(items[i]) for i in own], on_progress)
    answers = [(i, closed_answers.names[best]) for i, best in zip(own, scores.argmax(dim=1).tolist(), strict=True)]
    return [name for _, name in sorted(answers if is_together else all_gather(answers))]


def answer_likelihoods(
    kit: Kit,
    closed_answers: ClosedAnswers,
    prompts: Sequence[Sequence[int]],
    on_progress: ProgressFn | None = None,
    batch_size: int = 32,
) -> torch.Tensor:
    """Log-likelihood of each answer of the closed set after each prompt, [prompts, answers]."""
    shortened = _shortened(kit, prompts, max(map(len, closed_answers.token_ids)))
    answers, end = closed_answers.token_ids, closed_answers.end_token_id
    return label_likelihoods(kit, shortened, answers, end, batch_size, on_progress)


def _shortened(kit: Kit, prompts: Sequence[Sequence[int]], num_after: int) -> list[Sequence[int]]:
    """Prompts with room for the longest answer: an example's own may be shorter. What goes is what truncation takes
    first: the front of the context, behind a first token that all prompts share.
    """
    if kit.config.is_encoder_decoder or not prompts:
        return list(prompts)
    longest = max(map(len, prompts)) + num_after
    room = (max_tokens(kit, longest) or longest) - num_after
    kept = 1 if len({prompt[0] for prompt in prompts}) == 1 else 0
    return [p if len(p) <= room else (*p[:kept], *p[len(p) - room + kept :]) for p in prompts]


def default_max_new_tokens(items: Sequence[EncodedExample]) -> int:
    """Twice the longest reference, within bounds: a base may answer in a whole sentence."""
    longest = max(len(item.input_ids) - item.prompt_length if item.labels else len(item.target_ids) for item in items)
    return min(MAX_ANSWER_TOKENS, max(MIN_ANSWER_TOKENS, 2 * longest))


def compute_metrics(
    task: Task,
    items: Sequence[Any],
    predictions: Predictions,
    reference_of: Callable[[Any], Any],
    label_names: Sequence[str] = (),
) -> dict[str, Measure]:
    """The metrics of an objective's task over these predictions; for texts loss and token accuracy as well."""
    language = compute_measures("language", predictions.losses)
    if task != "generation":
        references = [reference_of(item) for item in items]
        measures = compute_measures(task, predictions.predictions, references, names=label_names or None)
        return measures | {"loss": language["loss"]}
    if predictions.likeliest_answers:
        references = [item.reference for item in items]
        return compute_measures("classification", predictions.likeliest_answers, references) | language
    if not predictions.texts:
        return language
    references = [item.reference for item in items if item.reference][: len(predictions.texts)]
    return compute_measures("generation", predictions.texts, references) | language
