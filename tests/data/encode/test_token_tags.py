"""Tags of words on the tokens of the true text, for every kind of fast tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kitout.data.encode.classification import WORDS_WITHOUT_TOKENS, TokenClassEncoder
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.examples.examples import Example, TaggedWords
from kitout.data.examples.formats import to_examples
from kitout.data.read.tables import DataError

CORPUS = ["Ada Wong lives in Ulm, not in Bonn.", "She saw Ulm (a town) in May: it rained.", "Wong Ada lives, Ulm lives"]
SPECIALS = ["<s>", "</s>", "<unk>"]
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WORDS, TAGS = ("Ada", "Wong", "lives", "in", "Ulm", "."), ("B-PER", "I-PER", "O", "O", "B-LOC", "O")
ROW = {
    "text": "Ada Wong  lives in Ulm.",
    "spans": [{"start": 0, "end": 8, "label": "PER"}, {"start": 19, "end": 22, "label": "LOC"}],
}
KINDS = ("bytes", "bytes-prefixed", "bytes-untrimmed", "wordpiece", "unigram", "metaspace-first", "prepended")


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind.startswith("bytes"):
        raw = Tokenizer(models.BPE(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-prefixed")
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.normalizer = normalizers.BertNormalizer()
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIALS, show_progress=False)
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        )
    else:
        raw = Tokenizer(models.BPE(unk_token="<unk>"))
        if kind == "prepended":
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        raw.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIALS, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    single = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    trim = processors.ByteLevel(trim_offsets=True)
    raw.post_processor = processors.Sequence([trim, single]) if kind in ("bytes", "bytes-prefixed") else single
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def encode(kind: str, *examples: Example, max_length: int = 64) -> list[EncodedExample]:
    return TokenClassEncoder(tokenizer(kind), max_length, LABELS)(list(examples))


def tagged_tokens(kind: str, item: EncodedExample) -> list[tuple[str, str]]:
    tok = tokenizer(kind)
    pairs = zip(item.input_ids, item.labels, strict=True)
    return [(tok.decode([i]).strip(), LABELS[label]) for i, label in pairs if label != IGNORE_INDEX]


@pytest.mark.parametrize("kind", KINDS)
def test_words_keep_the_spaces_between_them(kind: str) -> None:
    (item,) = encode(kind, TaggedWords(WORDS, TAGS))
    assert item.input_ids == tuple(tokenizer(kind)(" ".join(WORDS)).input_ids)
    assert [tag for _, tag in tagged_tokens(kind, item)] == list(TAGS)
    for (token, _), word in zip(tagged_tokens(kind, item), WORDS, strict=True):
        assert word.lower().startswith(token.lower())
    assert item.remarks == ()


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_tokenized_from_their_true_text(kind: str) -> None:
    (example,) = to_examples([(1, ROW)], "x")
    (item,) = encode(kind, example)
    assert item.input_ids == tuple(tokenizer(kind)(str(ROW["text"])).input_ids)
    assert [tag for _, tag in tagged_tokens(kind, item)] == list(TAGS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_words_first_token_carries_its_tag_wherever_it_is_cut(kind: str) -> None:
    for max_length in range(4, 30):
        (item,) = encode(kind, TaggedWords(WORDS, TAGS), max_length=max_length)
        assert len(item.input_ids) <= max_length
        assert [tag for _, tag in tagged_tokens(kind, item)] == list(TAGS[: item.num_targets])
        assert item.num_targets + item.num_truncated_targets == len(WORDS)


def test_words_without_a_token_are_reported_and_not_called_truncated() -> None:
    (item,) = encode("wordpiece", TaggedWords(("Ada", "\u200b", "Ulm"), ("B-PER", "O", "B-LOC")))
    assert [tag for _, tag in tagged_tokens("wordpiece", item)] == ["B-PER", "B-LOC"]
    assert (item.remarks, item.num_truncated_targets) == ((WORDS_WITHOUT_TOKENS,), 0)


def test_two_spans_in_one_word_are_refused_and_lists_are_spans() -> None:
    with pytest.raises(DataError, match=r"line 1: the spans 'PER' and 'LOC' \(at character 3\) are both in the word"):
        to_examples([(1, {"text": "AdaUlm", "spans": [[0, 3, "PER"], [3, 6, "LOC"]]})], "x")
    (example,) = to_examples([(1, {"text": "Ada in Ulm", "entities": '[[0, 3, "PER"], [7, 10, "LOC"]]'})], "x")
    assert example == TaggedWords(("Ada", "in", "Ulm"), ("B-PER", "O", "B-LOC"))
