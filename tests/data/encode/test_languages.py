"""Sources and targets carry the codes of their own languages, wherever a tokenizer writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kitout.data.encode.generation import Seq2SeqEncoder
from kitout.data.encode.item import EncodedExample
from kitout.data.encode.languages import find_languages
from kitout.data.examples.examples import Completion
from kitout.data.read.tables import DataError
from tiny_translators import mbart_tokenizer, nllb_tokenizer

Make = Callable[..., Any]


def encode(tokenizer: Any, source: str | None, target: str | None, **options: Any) -> EncodedExample:
    languages = find_languages(tokenizer, source, target)
    (item,) = Seq2SeqEncoder(tokenizer, 64, languages=languages, **options)([Completion("a cat", "eine katze")])
    return item


@pytest.mark.parametrize("target", ["deu_Latn", "fra_Latn"])
def test_codes_in_front(target: str) -> None:
    tok = nllb_tokenizer()
    item = encode(tok, "eng_Latn", target)
    code = tok.convert_tokens_to_ids(target)
    assert tok.decode(item.input_ids) == "eng_Latn a cat</s>"
    assert tok.decode(item.target_ids) == f"{target} eine katze</s>"
    assert find_languages(tok, None, target).generation_settings == {"forced_bos_token_id": code}  # type: ignore[union-attr]


def test_codes_behind() -> None:
    tok = mbart_tokenizer()
    item = encode(tok, None, "de_DE")  # the tokenizer's own source language
    assert tok.decode(item.input_ids) == "a cat</s>en_XX"
    assert tok.decode(item.target_ids) == "eine katze</s>de_DE"
    code = tok.convert_tokens_to_ids("de_DE")
    assert find_languages(tok, None, "de_DE").generation_settings == {"decoder_start_token_id": code}  # type: ignore[union-attr]


def test_languages_of_several_jobs_do_not_mix() -> None:
    tok = nllb_tokenizer()
    pairs = [find_languages(tok, "eng_Latn", "deu_Latn"), find_languages(tok, "fra_Latn", "eng_Latn")]
    encoders = [Seq2SeqEncoder(tok, 64, languages=languages) for languages in pairs]
    texts = [tok.decode(encoder([Completion("a", "b")])[0].target_ids) for encoder in encoders]
    assert texts == ["deu_Latn b</s>", "eng_Latn b</s>"]


def test_a_target_language_is_required_and_known(tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"set data\.tgt_lang \(and data\.src_lang, eng_Latn by default\)"):
        find_languages(nllb_tokenizer(), None, None)
    with pytest.raises(DataError, match=r"data\.tgt_lang=deu_Lat: the tokenizer has no such language; .*'deu_Latn'"):
        find_languages(nllb_tokenizer(), None, "deu_Lat")
    with pytest.raises(DataError, match="has no language codes; leave them out"):
        find_languages(tokenizer(), None, "de")
    assert find_languages(tokenizer(), None, None) is None
