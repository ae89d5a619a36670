"""Whether two tokenizers cut texts into the same tokens, and render chats by the same template: digests to compare.

The vocabulary with its ids and the tokens of a few probe texts count; file layout, library versions and settings of
padding do not. It knows no text of a user and no model.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

PROBE_TEXTS = (
    "The quick brown Fox, 3.14 times!",
    "  two  spaces\n\ttab",
    "naïve café Straße 東京 привет 🙂",
    "don't can't (a_b) x=y**2",
)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and of how it cuts the probe texts."""
    cut = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in PROBE_TEXTS]
    return _sha256([sorted(tokenizer.get_vocab().items()), [list(ids) for ids in cut]])


def template_digest(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template, or of all of them by name; None where there is none."""
    return _sha256(tokenizer.chat_template) if tokenizer.chat_template else None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()
