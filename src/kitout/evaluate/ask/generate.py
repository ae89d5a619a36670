"""What a model writes after prompts, greedily, wearing what its kit wears: the same text alone as in any batch.

An answer ends before the first end token, which is cut here: what follows it in a batch is padding, whose id may be a
real token. Decoders read prompts padded on the left, encoders on the right, where their positions start. It knows no
chat template and no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kitout.base.eval_mode import eval_mode
from kitout.data.padding import pad
from kitout.errors import ConfigError
from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.kit import Kit

# What starts an answer or forbids tokens is the model's own; sampling, search, penalties and least lengths are not.
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
) -> list[str]:
    """One answer per prompt, in their order, without special tokens and outer blanks.

    tokenizer: of the model, to decode; it is not changed. batch: halved while memory runs out. stop: ids that end an
    answer, besides those the model's generation config and the tokenizer name. tell: hears prompts done, and all.
    """
    if not kit.can_generate():
        raise ConfigError(f"{type(kit.base).__name__} cannot write: load the model with its language-modelling head")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    ends = stop_token_ids(kit, tokenizer, stop_ids)
    filler = next(i for i in (tokenizer.pad_token_id, *sorted(ends), 0) if i is not None)
    reads_first = bool(kit.config.is_encoder_decoder)

    def ask(rows: list[Sequence[int]]) -> list[str]:
        ids, mask = pad(rows, filler, "right" if reads_first else "left", kit.device)
        out = kit.generate(input_ids=ids, attention_mask=mask)
        written = out[:, 1 if reads_first else ids.shape[1] :].tolist()
        kept = [_cut_at_stop(row, ends) for row in written]
        return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]

    with eval_mode(kit.base, kit), _greedy_config(kit.base, max_new_tokens, sorted(ends), filler):
        return map_batches(prompts, batch_size, ask, on_progress)


def stop_token_ids(kit: Kit, tokenizer: Any, extra_ids: Sequence[int] = ()) -> set[int]:
    """Every id that ends an answer: of the model's generation config, of the tokenizer, and `stop`."""
    model: Any = kit.base
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list | tuple) else [named]
    return {int(i) for i in (*listed, tokenizer.eos_token_id, *extra_ids) if i is not None}


@contextmanager
def _greedy_config(model: Any, max_new_tokens: int, eos_token_ids: list[int], pad_token_id: int) -> Iterator[None]:
    """The model's generation config is put aside: transformers fills from it whatever a call leaves open."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(own, name) for name in KEPT_GENERATION_SETTINGS},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=eos_token_ids or None,
        pad_token_id=pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _cut_at_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in stop_ids), len(row))]
