"""Greedy generation with the kit's active adapters: the same answer alone as in any batch.

An answer ends before the first stop token and is cut here: what follows in a batch is padding, whose id may be a real
token. Decoders take prompts padded on the left, encoders on the right, where their positions start. An answer also ends
where the model's positions do. It knows no chat template and no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from kitout.base.eval_mode import eval_mode
from kitout.data.padding import pad
from kitout.errors import ConfigError, RouteError
from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.evaluate.ask.text_limit import check_prompts, max_tokens
from kitout.kit import Kit
from kitout.route import RouteEntry

# Settings that start an answer or forbid tokens stay the model's own; sampling, search, penalties and lengths do not.
KEPT_GENERATION_SETTINGS = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids",
)  # fmt: skip


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
    if len(routes) > 1 and _takes_rows(kit, routes):
        return _generate(kit, tokenizer, prompts, max_new_tokens, routes, batch_size, on_progress, stop_ids, None)
    found = []
    for route in routes:
        with kit.use(route):
            found.append(generate(kit, tokenizer, prompts, max_new_tokens, batch_size, on_progress, stop_ids=stop_ids))
    return found


def _takes_rows(kit: Kit, routes: Sequence[RouteEntry]) -> bool:
    try:
        with kit.use(tuple(routes)):
            return True
    except RouteError:
        return False


def _generate(
    kit: Kit, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    routes: Sequence[RouteEntry] | None, batch_size: int, on_progress: ProgressFn | None, stop_ids: Sequence[int],
    options: Mapping[str, Any] | None,
) -> list[list[str]]:  # fmt: skip
    """By route the answers to all prompts. routes: None: what is active, alone."""
    if not kit.can_generate():
        raise ConfigError(f"{type(kit.base).__name__} cannot generate: load the model with its language-modeling head")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    all_stop_ids = stop_token_ids(kit, tokenizer, stop_ids)
    pad_token_id = next(i for i in (tokenizer.pad_token_id, *sorted(all_stop_ids), 0) if i is not None)
    has_encoder = bool(kit.config.is_encoder_decoder)
    num_routes = 1 if routes is None else len(routes)
    room_by_length = _common_rooms(kit, prompts, max_new_tokens, routes)

    def ask(rows: list[Sequence[int]]) -> list[list[str]]:
        """Rows with less room for an answer than the others are generated apart: each is answered as if alone."""
        texts: dict[int, list[str]] = {}
        for room in sorted({room_by_length[len(row)] for row in rows}):
            alike = [i for i, row in enumerate(rows) if room_by_length[len(row)] == room]
            texts |= zip(alike, ask_alike([rows[i] for i in alike], room), strict=True)
        return [texts[i] for i in range(len(rows))]

    def ask_alike(rows: list[Sequence[int]], room: int) -> list[list[str]]:
        """By prompt its answer under each route."""
        ids, mask = pad([*rows] * num_routes, pad_token_id, "right" if has_encoder else "left", kit.device)
        by_row = None if routes is None else tuple(route for route in routes for _ in rows)
        with nullcontext() if by_row is None else kit.use(by_row):
            out = kit.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **(options or {}))
        generated = out[:, 1 if has_encoder else ids.shape[1] :].tolist()
        answers = [_cut_at_stop(row, all_stop_ids) for row in generated]
        texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        return [texts[i :: len(rows)] for i in range(len(rows))]

    with eval_mode(kit.base, kit), _greedy_config(kit.base, max_new_tokens, sorted(all_stop_ids), pad_token_id):
        found = map_batches(prompts, max(1, batch_size // num_routes), ask, on_progress)
    return [[answers[k] for answers in found] for k in range(num_routes)]


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


@contextmanager
def _greedy_config(model: Any, max_new_tokens: int, eos_token_ids: list[int], pad_token_id: int) -> Iterator[None]:
    """Replaces the model's generation config: transformers takes from it whatever a call does not set."""
    from transformers import GenerationConfig

    original = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(original, name) for name in KEPT_GENERATION_SETTINGS},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=eos_token_ids or None,
        pad_token_id=pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = original


def _cut_at_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))]
