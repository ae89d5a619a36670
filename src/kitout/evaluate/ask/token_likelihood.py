"""Log-likelihoods of tokens after prompts, under one route after the other or under several as rows of one batch.

A prompt with several answers is computed once, padded on the left; its cache is selected anew for the answers, which
run in groups of similar lengths. One with a single answer is one row, padded on the right. Logits are computed at
positions that predict a scored token, and a batch's are all that is held. It knows token ids and kits, and no texts,
no metrics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kitout.data.by_row import sum_by_row
from kitout.data.padding import pad
from kitout.errors import ConfigError, RouteError
from kitout.evaluate.ask import joined_rows
from kitout.evaluate.ask.batches import num_alike
from kitout.evaluate.ask.cache_rows import can_select_rows, can_share_prompts, select_rows
from kitout.evaluate.ask.shared_trunk import SharedTrunk
from kitout.evaluate.ask.text_limit import has_virtual_tokens
from kitout.kit import Kit
from kitout.route import RouteEntry

BATCH_TOKENS = 2048  # of one forward, its padding included
BATCH_LOGIT_BYTES = 512 * 2**20  # of one forward, in float32: a large vocabulary makes batches smaller
CACHE_TOKENS = 4 * BATCH_TOKENS  # whose keys a group of answers holds
CHUNK_BYTES = 64 * 2**20  # of float32 logits that are normalized at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Prompted:
    """A prompt and the answers that are scored after it, each by itself, as ids."""

    prompt: tuple[int, ...]
    """At least one."""
    answers: tuple[tuple[int, ...], ...]
    """At least one of at least one."""

    def __len__(self) -> int:
        """The tokens of its first forward."""
        return len(self.prompt) + (len(self.answers[0]) - 1 if len(self.answers) == 1 else 0)

    @property
    def num_tokens(self) -> int:
        """That a model reads for all of it: the last token of an answer is scored and not read."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class ScoredLogits:
    """Logits of one forward and which of them are asked for."""

    logits: Tensor
    """[N, V], at every position that was kept."""
    positions: Tensor
    """[M]: those of the N that predict a scored token."""
    targets: Tensor
    """[M]: the tokens."""
    rows: Tensor
    """[M]: whose they are, indices of the batch's rows."""

    def log_probs(self) -> Tensor:
        """Of every scored token, [M]."""
        chunks = self.logits.split(rows_per_chunk(self.logits.shape[1]))
        totals = torch.cat([at_least_float32(chunk).logsumexp(1) for chunk in chunks])
        return at_least_float32(self.logits[self.positions, self.targets]) - totals[self.positions]

    def parts(self, number: int) -> list[ScoredLogits]:
        """Of a batch with the same rows so many times, one after the other: each time by itself."""
        columns = (column.chunk(number) for column in (self.positions, self.targets, self.rows))
        return [ScoredLogits(self.logits, *each) for each in zip(*columns, strict=True)]


def rows_per_chunk(vocabulary: int) -> int:
    """How many rows of logits are normalized at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is too coarse for a softmax."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def row_totals(values_M: Tensor, rows_M: Tensor, num_rows: int) -> list[float]:
    """Sums in float64."""
    return sum_by_row(values_M.cpu().double(), rows_M.cpu(), num_rows).tolist()


class TokenScorer:
    """`answer_scores` and `row_logits` of one kit under several routes; within `eval_mode`.

    names: adapters, or None for the base; none given: what is active, merged adapters included.
    """

    def __init__(self, kit: Kit, names: Sequence[RouteEntry] | None = None) -> None:
        if names is not None and not names:
            raise ConfigError("no adapter to score: give names, None for the base, or nothing for what is active")
        if names is None and isinstance(kit.active, tuple):
            raise ConfigError("the active route names rows of one batch: kit.use(...) one adapter, or give names")
        self.kit, self.switches = kit, names is not None
        self.routes: Sequence[Any] = [kit.active] if names is None else list(names)
        self.parameters = inspect.signature(kit.base.forward).parameters
        self.can_select_cache = not kit.config.is_encoder_decoder  # until a cache says otherwise
        self.can_join = True  # until a route is refused as a row
        self.trunk: SharedTrunk | None = None
        self._is_trunk_known = not self.switches

    @property
    def prompt_tokens(self) -> int:
        """Of one forward of which the last logits of each row are wanted."""
        return BATCH_TOKENS if "logits_to_keep" in self.parameters else self.batch_tokens

    @property
    def batch_tokens(self) -> int:
        """Of one forward of which all logits are wanted."""
        vocabulary = self.kit.config.get_text_config(decoder=True).vocab_size
        return max(1, min(BATCH_TOKENS, BATCH_LOGIT_BYTES // (4 * vocabulary)))

    # ---- routes ------------------------------------------------------------------------------------------------

    def under_each(self, num_tokens: int, run: Callable[[Sequence[RouteEntry]], list[T]]) -> list[T]:
        """What `run` gives for each route, in order; it is called with several that share a batch, or with one.

        num_tokens: of the batch under one of them. Where it is not known yet which is faster, `run` is called in both
        ways first (`joined_rows`).
        """
        routes = self.routes
        if not self._is_trunk_known:
            self.trunk, self._is_trunk_known = SharedTrunk.find(self.kit, routes), True
        together: list[tuple[int, ...]] = [(i,) for i in range(len(routes))]
        if self.can_join and len(routes) > 1 and self._fits(num_tokens):
            # Rows without virtual tokens would count their positions from the left edge of a padded batch.
            kinds = [self._has_virtual_tokens(route) for route in routes]
            together = [tuple(i for i, k in enumerate(kinds) if k == kind) for kind in dict.fromkeys(kinds)]
        found: dict[int, T] = {}
        self._forget_trunk()  # of the batch before
        for group in together:
            found |= zip(group, self._run_together([routes[i] for i in group], num_tokens, run), strict=True)
        return [found[i] for i in range(len(routes))]

    def _fits(self, num_tokens: int) -> bool:
        """Whether rows of all routes are no more than a batch has."""
        return num_tokens * len(self.routes) <= max(self.batch_tokens, joined_rows.SURE_TOKENS * len(self.routes))

    def _run_together(
        self, routes: Sequence[RouteEntry], num_tokens: int, run: Callable[[Sequence[RouteEntry]], list[T]]
    ) -> list[T]:
        def in_groups_of(size: int) -> list[T]:
            groups = [routes[start : start + size] for start in range(0, len(routes), size)]
            return [result for group in groups for result in run(group)]

        if len(routes) < 2:
            return in_groups_of(1)
        try:
            size = len(routes)
            joined = joined_rows.joins(self.kit, tuple(routes), num_tokens)
            if joined is None:

                def anew(size: int) -> list[T]:  # what one way has kept would make the other one faster
                    self._forget_trunk()
                    return in_groups_of(size)

                both = partial(anew, size), partial(anew, 1)
                joined = joined_rows.try_both(self.kit, tuple(routes), num_tokens, *both)
            return in_groups_of(size if joined else 1)
        except RouteError:  # what these adapters train cannot differ by row
            self.can_join = False
        return in_groups_of(1)

    def _forget_trunk(self) -> None:
        if self.trunk is not None:
            self.trunk.forget()

    def _has_virtual_tokens(self, route: RouteEntry) -> bool:
        with self.kit.use(route):
            return has_virtual_tokens(self.kit)

    # ---- prompts with answers ----------------------------------------------------------------------------------

    def answer_scores(self, routes: Sequence[RouteEntry], items: Sequence[Prompted]) -> list[list[list[float]]]:
        """Log-likelihoods by route, item and answer, in one batch with a row for each route and item."""
        rows = [(route, item) for route in routes for item in items]
        may_share = self.can_select_cache and can_share_prompts(self.kit, routes)
        shared = [i for i, (_, item) in enumerate(rows) if may_share and len(item.answers) > 1]
        scores: dict[int, list[float]] = {}
        if shared:
            found = self._prefilled([rows[i] for i in shared])
            scores |= zip(shared, found, strict=True) if found is not None else ()
        alone = [i for i in range(len(rows)) if i not in scores]
        single = [(rows[i][0], Prompted(rows[i][1].prompt, (a,))) for i in alone for a in rows[i][1].answers]
        values = iter(self._row_scores(single))
        scores |= {i: [next(values) for _ in rows[i][1].answers] for i in alone}
        return [[scores[k * len(items) + i] for i in range(len(items))] for k in range(len(routes))]

    def _prefilled(self, rows: Sequence[tuple[RouteEntry, Prompted]]) -> list[list[float]] | None:
        """The scores of all answers of each row; None where the cache's rows cannot be selected."""
        device = self.kit.device
        routes, items = [route for route, _ in rows], [item for _, item in rows]
        ids, mask = pad([item.prompt for item in items], 0, "left", device)
        lengths = mask.sum(1)
        cached = any(len(answer) > 1 for item in items for answer in item.answers)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = self._forward(routes, ids, mask, ids.shape[1] - 1, positions, use_cache=cached)
        if cached and not can_select_rows(out.get("past_key_values")):
            self.can_select_cache = False
            return None
        cache, logits_BV = out.get("past_key_values"), out.logits[:, -1]
        del out
        pairs = [(i, k) for i, item in enumerate(items) for k in range(len(item.answers))]
        owner = torch.tensor([i for i, _ in pairs], device=device)
        first = torch.tensor([items[i].answers[k][0] for i, k in pairs], device=device)
        values = ScoredLogits(logits_BV, owner, first, owner).log_probs().double().tolist()
        scores = dict(zip(pairs, values, strict=True))
        del logits_BV
        rest = [(i, k) for i, k in pairs if len(items[i].answers[k]) > 1]
        for group in _groups(rest, lambda p: len(items[p[0]].answers[p[1]]) - 1, ids.shape[1], self.batch_tokens):
            answers = [items[i].answers[k] for i, k in group]
            index = torch.tensor([i for i, _ in group], device=device)
            new_ids, new_mask = pad([answer[:-1] for answer in answers], 0, "right", device)
            # Padding stays at the last position. Behind a sliding window it is not masked: it would see nothing at
            # all, and nothing before it sees it anyway.
            steps = (new_mask.cumsum(1) - 1).clamp_min(0)
            new_mask = torch.ones_like(new_mask) if any(cache.is_sliding) else new_mask
            out = self._forward(
                [routes[i] for i, _ in group],
                new_ids,
                torch.cat((mask[index], new_mask), 1),
                0,
                lengths[index, None] + steps,
                cache=select_rows(cache, index, len(items)),
            )
            scored = _scored(out.logits, [0] * len(group), [answer[1:] for answer in answers], 0)
            for pair, value in zip(group, row_totals(scored.log_probs(), scored.rows, len(group)), strict=True):
                scores[pair] += value
            del out, scored
        return [[scores[i, k] for k in range(len(item.answers))] for i, item in enumerate(items)]

    def _row_scores(self, rows: Sequence[tuple[RouteEntry, Prompted]]) -> Iterator[float]:
        """Of rows with one answer each, as many at a time as a batch holds, in order."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][1]))
        scores: dict[int, float] = {}
        while len(scores) < len(rows):
            rest = order[len(scores) :]
            batch = rest[: num_alike([len(rows[i][1]) for i in rest], self.batch_tokens)]
            scored = self.row_logits([rows[i][0] for i in batch], [rows[i][1] for i in batch])
            scores |= zip(batch, row_totals(scored.log_probs(), scored.rows, len(batch)), strict=True)
            del scored
        return (scores[i] for i in range(len(rows)))

    # ---- forwards ----------------------------------------------------------------------------------------------

    def row_logits(self, routes: Sequence[RouteEntry], items: Sequence[Prompted]) -> ScoredLogits:
        """The logits that predict the only answer of each item, from one forward over a row for each."""
        device = self.kit.device
        answers = [item.answers[0] for item in items]
        if self.kit.config.is_encoder_decoder:
            ids, mask = pad([item.prompt for item in items], 0, "right", device)
            start = self.kit.config.decoder_start_token_id
            decoder_ids, _ = pad([(start, *answer[:-1]) for answer in answers], 0, "right", device)
            with self._use(routes):
                out = self.kit(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
            return _scored(out.logits, [0] * len(items), answers, 0)
        ids, _ = pad([(*item.prompt, *item.answers[0][:-1]) for item in items], 0, "right", device)
        starts = [len(item.prompt) - 1 for item in items]
        # nothing sees what is padded at the right, and beyond a sliding window it would see nothing itself
        out = self._forward(routes, ids, torch.ones_like(ids), min(starts), None)
        return _scored(out.logits, starts, answers, ids.shape[1] - out.logits.shape[1])

    def _forward(
        self,
        routes: Sequence[RouteEntry],
        ids: Tensor,
        mask: Tensor,
        first: int,
        positions: Tensor | None,
        *,
        cache: Any = None,
        use_cache: bool = False,
    ) -> Any:
        """One forward with a route for each row; logits from column `first` on, or more where the model has no choice.

        positions: None: the text begins at the left edge. Behind virtual tokens the kit counts them itself.
        """
        options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if "logits_to_keep" in self.parameters:
            options["logits_to_keep"] = ids.shape[1] - first
        with self._use(routes):
            if positions is not None and "position_ids" in self.parameters and not has_virtual_tokens(self.kit):
                options["position_ids"] = positions
            if self.trunk is not None and not use_cache and cache is None:
                with self.trunk.within(ids, mask, options.get("position_ids")):
                    return self.kit(input_ids=ids, attention_mask=mask, use_cache=False, **options)
            return self.kit(input_ids=ids, attention_mask=mask, use_cache=use_cache or cache is not None, **options)

    def _use(self, routes: Sequence[RouteEntry]) -> Any:
        """The route of a batch: one for all rows where it is the same, which may be what rows cannot have."""
        if not self.switches:
            return nullcontext()
        return self.kit.use(routes[0] if len(set(routes)) == 1 else tuple(routes))


def _scored(logits_RKV: Tensor, starts: Sequence[int], answers: Sequence[Sequence[int]], skipped: int) -> ScoredLogits:
    """starts: column that predicts each row's first token. skipped: columns before those of the logits."""
    width, device = logits_RKV.shape[1], logits_RKV.device
    begins = [r * width + start - skipped for r, start in enumerate(starts)]
    positions = [begin + t for begin, answer in zip(begins, answers, strict=True) for t in range(len(answer))]
    rows = [r for r, answer in enumerate(answers) for _ in answer]
    return ScoredLogits(
        logits_RKV.reshape(-1, logits_RKV.shape[-1]),
        torch.tensor(positions, device=device),
        torch.tensor([token for answer in answers for token in answer], device=device),
        torch.tensor(rows, device=device),
    )


def _groups(pairs: Sequence[T], length: Callable[[T], int], num_cached: int, max_tokens: int) -> Iterator[Sequence[T]]:
    """Pairs in groups of similar lengths, the longest first, each within the tokens of a batch and of a cache."""
    pairs = sorted(pairs, key=lambda pair: -length(pair))
    while pairs:
        lengths = [length(pair) for pair in pairs]
        number = num_alike(lengths, min(max_tokens, CACHE_TOKENS * lengths[0] // (num_cached + lengths[0])))
        yield pairs[:number]
        pairs = pairs[number:]
