"""Texts as token ids the way lm-evaluation-harness makes them, so that its numbers can be compared with ours.

A prompt and what follows are tokenized as one text and cut behind the prompt's own tokens; spaces that end a prompt
belong to what follows. A long text is read in disjoint windows behind one start token. Read in lm_eval 0.4.13
(`api/model.py`, `utils.py`, `models/huggingface.py`). It knows tokenizers, and nothing of models or kits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kitout.errors import ConfigError


def start_token_id(tokenizer: Any) -> int:
    """What comes before a text's first token: the tokenizer's start token, else its end token."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ConfigError(
        f"{type(tokenizer).__name__} has neither a start nor an end token, and the first token of a text is scored "
        "behind one: set tokenizer.bos_token"
    )


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool | None = None) -> list[int]:
    """The ids of a text. add_special_tokens: None: as the tokenizer does, unless the text begins with a start token."""
    starts = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    if add_special_tokens is None and any(text.startswith(tokenizer.decode(start)) for start in starts):
        add_special_tokens = False
    options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
    return list(tokenizer.encode(text, **options))


def encode_pairs(
    tokenizer: Any, prompt: str, continuations: Sequence[str], is_encoder_decoder: bool = False
) -> tuple[list[int], list[list[int]]]:
    """The ids of a prompt, at least one, and of each text that may follow; one of them may come out empty."""
    if not prompt:
        start = start_token_id(tokenizer)
        encoded = [encode_text(tokenizer, text, add_special_tokens=False) for text in continuations]
        return [start], [ids[1:] if ids[:1] == [start] else ids for ids in encoded]
    kept = prompt.rstrip()
    spaces = prompt[len(kept) :]
    if not kept:
        raise ConfigError("a prompt is all white space: leave it empty, or write something in it")
    ids = encode_text(tokenizer, kept)
    if is_encoder_decoder:
        return ids, [encode_text(tokenizer, spaces + text, add_special_tokens=False) for text in continuations]
    return ids, [encode_text(tokenizer, prompt + text)[len(ids) :] for text in continuations]


def rolling_windows(ids: Sequence[int], start_id: int, max_tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    """(what is read before, what is scored) for a text of any length: every token is scored once.

    A window reads at most max_tokens. Each begins with one token of context, the last with as many as it has room for.
    """
    if max_tokens < 1:
        raise ConfigError(f"a window of {max_tokens} tokens reads nothing: at least 1")
    tokens = list(ids)
    if tokens:
        yield [start_id], tokens[:max_tokens]
    for begin in range(max_tokens, len(tokens), max_tokens):
        end = min(begin + max_tokens, len(tokens))
        yield tokens[end - max_tokens - 1 : begin], tokens[begin:end]
