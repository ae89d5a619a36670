"""Greedy answers as text with the kit's active adapters, or of several routes as rows of the same batches.

A text ends before the first stop token, without special tokens and surrounding white space. What is fixed for a batch,
lengths, ends, padding and settings, is `decoding.py`'s. It knows no chat template and no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.evaluate.ask.decoding import answer_ids, decode_answers, plan_decoding, takes_rows
from kitout.kit import Kit
from kitout.route import RouteEntry


def generate(
    kit: Kit,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    on_progress: ProgressFn | None = None,
    *,
    stop_ids: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """One answer per prompt, in order, without special tokens and surrounding white space.

    tokenizer: of the model, to decode; it is not changed. batch_size: halved while memory runs out. on_progress: is
    called with the number of prompts done and of all. stop_ids: ids that end an answer, besides those of the model's
    generation config and of the tokenizer. options: of sampling and streaming, as the model's own `generate` takes
    them. ConfigError for a prompt that is longer than the model reads; an answer that
    does not fit behind its prompt is cut there.
    """
    (texts,) = _generate(kit, tokenizer, prompts, max_new_tokens, None, batch_size, on_progress, stop_ids, options)
    return texts


def generate_under(
    kit: Kit,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    routes: Sequence[RouteEntry],
    batch_size: int = 16,
    on_progress: ProgressFn | None = None,
    *,
    stop_ids: Sequence[int] = (),
) -> list[list[str]]:
    """By route the answers that `generate` gives under it, all routes as rows of the same batches.

    Decoding is bound by reading the base's weights, so eight adapters together take little longer than one. batch_size:
    rows of a batch. Everything else as `generate`. Where a model or an adapter takes no rows, one route runs after the
    other.
    """
    if len(routes) > 1 and takes_rows(kit, routes):
        return _generate(kit, tokenizer, prompts, max_new_tokens, routes, batch_size, on_progress, stop_ids, None)
    found = []
    for route in routes:
        with kit.use(route):
            found.append(generate(kit, tokenizer, prompts, max_new_tokens, batch_size, on_progress, stop_ids=stop_ids))
    return found


def _generate(
    kit: Kit, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    routes: Sequence[RouteEntry] | None, batch_size: int, on_progress: ProgressFn | None, stop_ids: Sequence[int],
    options: Mapping[str, Any] | None,
) -> list[list[str]]:  # fmt: skip
    """By route the answers to all prompts. routes: None: what is active, alone."""
    decoding = plan_decoding(kit, tokenizer, prompts, max_new_tokens, routes, stop_ids)
    num_routes = 1 if routes is None else len(routes)

    def ask(rows: list[Sequence[int]]) -> list[list[str]]:
        """By prompt its answer under each route."""
        by_row = None if routes is None else [route for route in routes for _ in rows]
        answers = answer_ids(kit, [*rows] * num_routes, by_row, decoding, lambda _: options or {})
        texts = decode_answers(tokenizer, answers, decoding.stop_ids)
        return [texts[i :: len(rows)] for i in range(len(rows))]

    with decoding.active(kit):
        found = map_batches(prompts, max(1, batch_size // num_routes), ask, on_progress)
    return [[answers[k] for answers in found] for k in range(num_routes)]
