"""Languages of a sequence-to-sequence tokenizer: it writes a code into source and target, by which a model translates.

Where the code of the target language stands decides how generation starts: as the first token that is forced (NLLB,
mBART-50), or as the token that the decoder starts with (the first mBART). Found by tokenizing an empty target. It knows
no model and no text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kitout.data.read.tables import DataError
from kitout.errors import suggest


@dataclass(frozen=True)
class Languages:
    """What a tokenizer is set to, and how a model starts to write in it."""

    source: str
    """The code of the source language."""
    target: str
    """The code of the target language."""
    generation_settings: Mapping[str, int]
    """forced_bos_token_id, or decoder_start_token_id: the id of the target language."""

    def apply(self, tokenizer: Any) -> None:
        """Sets the tokenizer to these languages: several jobs share it."""
        tokenizer.src_lang, tokenizer.tgt_lang = self.source, self.target


def find_languages(tokenizer: Any, source: str | None, target: str | None) -> Languages | None:
    """Sets the tokenizer's languages, and says which they are; None for a tokenizer without languages.

    source, target: None for the tokenizer's own. DataError for a language that it does not have, for settings of a
    tokenizer without languages, and for a target language that nothing names.
    """
    if not isinstance(inspect.getattr_static(type(tokenizer), "src_lang", None), property):
        if source or target:
            raise DataError(
                f"data.src_lang={source} and data.tgt_lang={target}: the tokenizer ({type(tokenizer).__name__}) has no "
                "language codes; leave them out"
            )
        return None
    source, target = source or tokenizer.src_lang, target or tokenizer.tgt_lang
    codes = [token for token in map(str, tokenizer.added_tokens_decoder.values()) if token[:1].isalpha()]
    if target is None:
        raise DataError(
            f"the tokenizer ({type(tokenizer).__name__}) writes a language code into each target: set data.tgt_lang "
            f"(and data.src_lang, {source} by default); {suggest('', codes)}"
        )
    for name, code in (("src_lang", source), ("tgt_lang", target)):
        if tokenizer.convert_tokens_to_ids(code) in (None, tokenizer.unk_token_id):
            raise DataError(f"data.{name}={code}: the tokenizer has no such language; {suggest(code, codes)}")
    languages = Languages(source, target, {})
    languages.apply(tokenizer)
    empty, target_id = tokenizer(text_target="")["input_ids"], int(tokenizer.convert_tokens_to_ids(target))
    starts_target = target_id in empty and empty.index(target_id) < empty.index(tokenizer.eos_token_id)
    setting = "forced_bos_token_id" if starts_target else "decoder_start_token_id"
    return Languages(source, target, {setting: target_id})
