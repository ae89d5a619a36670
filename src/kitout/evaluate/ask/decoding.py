"""Generation of a batch of rows: the same answer alone as in any batch, greedy or drawn.

An answer ends with the first stop token and is cut there: what follows in a batch is padding, whose id may be a real
token. Decoders take prompts padded on the left, encoders on the right, where their positions start. An answer also ends
where the model's positions do. Greedy unless the caller's options draw tokens. It knows no chat template, no text of a
prompt and no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.data.padding import pad
from kitout.errors import ConfigError, RouteError
from kitout.evaluate.ask.cache_rows import can_select_rows, can_share_prompts, select_rows
from kitout.evaluate.ask.text_limit import check_prompts, max_tokens
from kitout.kit import Kit
from kitout.route import RouteEntry

# Settings that start an answer or forbid tokens stay the model's own; sampling, search, penalties and lengths do not.
KEPT_GENERATION_SETTINGS = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids",
)  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """What is fixed for all rows of one generation."""

    stop_ids: frozenset[int]
    """Any of these ends an answer."""
    pad_token_id: int
    """What fills rows up; perhaps the id of a real token."""
    max_new_tokens: int
    """Tokens of an answer at most."""
    rooms: Mapping[int, int]
    """By length of a prompt: how many tokens its answer may have."""

    @contextmanager
    def active(self, kit: Kit, kept: Sequence[str] = KEPT_GENERATION_SETTINGS) -> Iterator[None]:
        """Eval mode, and a generation config in place of the model's, with what `kept` names of it.

        transformers takes from the config whatever a call does not set, so a config of its own leaves nothing open.
        """
        from transformers import GenerationConfig

        model: Any = kit.base
        original = model.generation_config
        with eval_mode(kit.base, kit):
            model.generation_config = GenerationConfig(
                **{name: getattr(original, name) for name in kept},
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(self.stop_ids) or None,
                pad_token_id=self.pad_token_id,
            )
            try:
                yield
            finally:
                model.generation_config = original


def plan_decoding(
    kit: Kit, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    routes: Sequence[RouteEntry] | None, stop_ids: Sequence[int],
) -> Decoding:  # fmt: skip
    """ConfigError for a model that cannot generate, no new token, or a prompt that is longer than the model reads.

    routes: all that take part; None: what is active, alone. stop_ids: besides those of model and tokenizer.
    """
    if not kit.can_generate():
        raise ConfigError(f"{type(kit.base).__name__} cannot generate: load the model with its language-modeling head")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    ends = frozenset(stop_token_ids(kit, tokenizer, stop_ids))
    pad_token_id = next(i for i in (tokenizer.pad_token_id, *sorted(ends), 0) if i is not None)
    return Decoding(ends, pad_token_id, max_new_tokens, _common_rooms(kit, prompts, max_new_tokens, routes))


def answer_ids(
    kit: Kit, rows: Sequence[Sequence[int]], by_row: Sequence[RouteEntry] | None, decoding: Decoding,
    options_for: Callable[[list[int]], Mapping[str, Any]], share_prompts: bool = False,
) -> list[list[int]]:  # fmt: skip
    """By row the ids of its answer, the token that ended it included; nothing that follows in a batch.

    by_row: the route of each row; None: what is active. options_for: what `generate` is given besides, for the rows of
    these numbers: rows with less room for an answer than the others are generated apart, so each is answered as if
    alone. share_prompts: equal prompts under one route are computed once, where their cache can be selected by row.
    To be called inside `decoding.active`.
    """
    has_encoder = bool(kit.config.is_encoder_decoder)
    answers: dict[int, list[int]] = {}
    for room in sorted({decoding.rooms[len(row)] for row in rows}):
        alike = [i for i, row in enumerate(rows) if decoding.rooms[len(row)] == room]
        side: Literal["left", "right"] = "right" if has_encoder else "left"
        ids, mask = pad([rows[i] for i in alike], decoding.pad_token_id, side, kit.device)
        entries = None if by_row is None else [by_row[i] for i in alike]
        cache = (
            _shared_cache(kit, [rows[i] for i in alike], entries, ids, mask)
            if share_prompts and not has_encoder
            else {}
        )
        with _active(kit, entries):
            out = kit.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **cache, **options_for(alike))
        generated = out[:, 1 if has_encoder else ids.shape[1] :].tolist()
        answers |= zip(alike, (_cut_after_stop(row, decoding.stop_ids) for row in generated), strict=True)
    return [answers[i] for i in range(len(rows))]


def _active(kit: Kit, entries: Sequence[RouteEntry] | None) -> AbstractContextManager[Any]:
    """The routes of a batch's rows: one for all where it is the same. None: what is active."""
    if entries is None:
        return nullcontext()
    return kit.use(tuple(entries) if len(set(entries)) > 1 else entries[0])


def _shared_cache(
    kit: Kit, rows: Sequence[Sequence[int]], entries: Sequence[RouteEntry] | None, ids: Tensor, mask: Tensor
) -> dict[str, Any]:
    """`past_key_values` of all but the last column, each distinct row computed once; empty where that is not possible.

    The last column is left to the rows, since it is computed for each row that draws its own first token from it.
    """
    keys = [(tuple(row), None if entries is None else entries[i]) for i, row in enumerate(rows)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    first = [keys.index(key) for key in numbers]
    routes = [kit.active] if entries is None else list(dict.fromkeys(entries))
    has_rows = isinstance(kit.active, tuple) if entries is None else False
    if 2 * len(first) > len(rows) or min(map(len, rows)) < 2 or has_rows or not can_share_prompts(kit, routes):
        return {}
    with _active(kit, None if entries is None else [entries[i] for i in first]):
        out = kit.generate(
            input_ids=ids[first, :-1], attention_mask=mask[first, :-1], max_new_tokens=1, return_dict_in_generate=True
        )
    if not can_select_rows(out.past_key_values):
        return {}
    index = torch.tensor([numbers[key] for key in keys], device=ids.device)
    return {"past_key_values": select_rows(out.past_key_values, index, len(first))}


def decode_answers(tokenizer: Any, answers: Sequence[Sequence[int]], stop_ids: AbstractSet[int]) -> list[str]:
    """As text, without the token that ended it, special tokens and surrounding white space."""
    ids = [answer[:-1] if answer and answer[-1] in stop_ids else answer for answer in answers]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _common_rooms(
    kit: Kit, prompts: Sequence[Sequence[int]], max_new_tokens: int, routes: Sequence[RouteEntry] | None
) -> dict[int, int]:
    """`_answer_rooms` under every route: virtual tokens of any of them take room from all."""
    if routes is None:
        return _answer_rooms(kit, prompts, max_new_tokens)
    rooms: dict[int, int] = {}
    for route in dict.fromkeys(routes):
        with kit.use(route):
            for length, room in _answer_rooms(kit, prompts, max_new_tokens).items():
                rooms[length] = min(room, rooms.get(length, room))
    return rooms


def _answer_rooms(kit: Kit, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> dict[int, int]:
    """By length of a prompt: how many tokens its answer may have. The last one is written and not read."""
    lengths = {len(prompt) for prompt in prompts if prompt}
    check_prompts(kit, prompts)
    if kit.config.is_encoder_decoder:
        room = max(1, max_tokens(kit, max_new_tokens, "target") or max_new_tokens)
        return dict.fromkeys(lengths, room)
    longest = max(lengths, default=0) + max_new_tokens - 1
    limit = max_tokens(kit, longest) or longest
    return {length: max(1, min(max_new_tokens, limit - length + 1)) for length in lengths}


def stop_token_ids(kit: Kit, tokenizer: Any, extra_ids: Sequence[int] = ()) -> set[int]:
    """Every id that ends an answer: of the model's generation config, of the tokenizer, and `extra_ids`."""
    model: Any = kit.base
    eos = model.generation_config.eos_token_id
    eos_ids = eos if isinstance(eos, list | tuple) else [eos]
    return {int(i) for i in (*eos_ids, tokenizer.eos_token_id, *extra_ids) if i is not None}


def _cut_after_stop(row: list[int], stop_ids: AbstractSet[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))]


def takes_rows(kit: Kit, routes: Sequence[RouteEntry]) -> bool:
    """Whether rows of one batch can have these routes."""
    try:
        with kit.use(tuple(routes)):
            return True
    except RouteError:
        return False
