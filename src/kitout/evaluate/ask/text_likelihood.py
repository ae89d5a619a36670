"""How likely texts are to a model: the log-likelihood of every token, and how far it moved from the base's predictions.

Texts are read in the windows of lm-evaluation-harness (`harness_tokens.py`), so that bits per byte are its own. Base
and adapters run one after the other on the same batch of windows: N adapters cost N + 1 passes, with divergences or
without, and two batches' logits are the most that is held. It knows no chats, no metrics and no data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kitout.base.eval_mode import eval_mode
from kitout.errors import ConfigError
from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.evaluate.ask.divergence import token_divergence
from kitout.evaluate.ask.harness_tokens import encode_text, rolling_windows, start_token_id
from kitout.evaluate.ask.text_limit import window_tokens
from kitout.evaluate.ask.token_likelihood import Prompted, ScoredLogits, TokenScorer, row_totals
from kitout.evaluate.metrics.texts import TextSums
from kitout.kit import Kit
from kitout.route import RouteEntry


def text_likelihoods(
    kit: Kit,
    tokenizer: Any,
    texts: Sequence[str],
    names: Sequence[RouteEntry] | None = None,
    *,
    divergence: bool = False,
    max_length: int | None = None,
    batch_size: int = 256,
    on_progress: ProgressFn | None = None,
) -> list[list[TextSums]]:
    """For each name the sums of every text, in order; `compute_measures("text", sums)` makes bits per byte of them.

    names: adapters, and None for the base; none given: what is active. divergence: also KL(base || name) over the
    scored tokens, on the same windows; the base then runs once per batch, whether it is among the names or not.
    max_length: tokens of a window; default: what the model reads under every one of the names. batch_size: windows in
    one batch, at most; halved while memory runs out. ConfigError for an encoder-decoder, and for a tokenizer without
    start and end.
    """
    check_texts(kit, tokenizer, divergence=divergence)
    scorer = TokenScorer(kit, names)
    asked = list(scorer.routes)
    if divergence:  # the base first: the others are compared with it
        scorer = TokenScorer(kit, [None, *(route for route in asked if route is not None)])
    start = start_token_id(tokenizer)
    encoded = [encode_text(tokenizer, text) for text in texts]
    longest = max(map(len, encoded), default=1)
    limit = window_tokens(kit, tokenizer, scorer.routes if scorer.switches else None, max_length or max(1, longest))
    windows, owners = [], []
    for i, ids in enumerate(encoded):
        for context, scored in rolling_windows(ids, start, limit):
            windows.append(Prompted(tuple(context), (tuple(scored),)))
            owners.append(i)

    def ask(batch: list[Prompted]) -> list[list[tuple[float, float]]]:
        """By window and route: its log-likelihood and its divergence."""
        base: list[ScoredLogits] = []  # of the last run: a batch may be asked more than once

        def run(routes: Sequence[RouteEntry]) -> list[list[tuple[float, float]]]:
            rows = [(route, item) for route in routes for item in batch]
            scored = scorer.row_logits([route for route, _ in rows], [item for _, item in rows])
            log_likelihoods = row_totals(scored.log_probs(), scored.rows, len(rows))
            moved = [0.0] * len(rows)
            if divergence:
                parts = scored.parts(len(routes))
                base[:] = [part for part, route in zip(parts, routes, strict=True) if route is None] or base
                values = torch.cat([token_divergence(base[0], part) for part in parts])
                moved = row_totals(values, scored.rows, len(rows))
            pairs = list(zip(log_likelihoods, moved, strict=True))
            return [pairs[k * len(batch) : (k + 1) * len(batch)] for k in range(len(routes))]

        by_route = scorer.under_each(sum(map(len, batch)), run)
        return [[of_route[i] for of_route in by_route] for i in range(len(batch))]

    with eval_mode(kit.base, kit):
        found = map_batches(windows, batch_size, ask, on_progress, scorer.batch_tokens)
    results = []
    for name in asked:
        k = scorer.routes.index(name)
        sums = [[0.0, 0.0] for _ in texts]
        for owner, of_window in zip(owners, found, strict=True):
            sums[owner] = [total + value for total, value in zip(sums[owner], of_window[k], strict=True)]
        results.append(
            [
                TextSums(-log_likelihood, len(ids), len(text.encode()), moved if divergence else None)
                for (log_likelihood, moved), ids, text in zip(sums, encoded, texts, strict=True)
            ]
        )
    return results


def check_texts(kit: Kit, tokenizer: Any, *, divergence: bool = False) -> None:
    """ConfigError where `text_likelihoods` would raise one, without asking the model anything."""
    if kit.config.is_encoder_decoder:
        raise ConfigError(f"{type(kit.base).__name__} reads and writes: a text has no likelihood under it by itself")
    if divergence and kit.merged:
        raise ConfigError(f"{', '.join(kit.merged)} merged into the base: kit.unmerge() before comparing with it")
    start_token_id(tokenizer)
