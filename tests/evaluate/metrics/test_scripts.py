"""Texts without spaces between words are compared by character, and the report says so."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from kitout.evaluate.compare import compare
from kitout.evaluate.metrics import scripts
from kitout.evaluate.metrics.generation import label_named, token_f1
from kitout.evaluate.metrics.registry import compute_measures, metric_title
from kitout.evaluate.metrics.scripts import bleu_tokenizer, lacks_spaces, split_units

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sacrebleu", "rouge_score")), reason="extra eval"
)
CHINESE = ["北京是中国的首都。", "我喜欢喝绿茶", "他昨天去了学校"]
JAPANESE = ["東京は日本の首都です。", "カタカナもあります", "私は学生です"]
THAI = ["กรุงเทพเป็นเมืองหลวงของไทย", "ฉันรักแมว"]
KOREAN = ["서울은 한국의 수도입니다", "나는 고양이를 좋아해요"]


def test_scripts_are_told_apart_by_the_majority_of_letters() -> None:
    assert lacks_spaces([*CHINESE, *JAPANESE, *THAI]) == [True] * 8
    assert lacks_spaces(["ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာဘာသာ"]) == [True] * 3
    assert lacks_spaces([*KOREAN, "plain words", "le café", "Привет мир", "١٢٣ مرحبا"]) == [False] * 6
    assert lacks_spaces(["the word 茶 means tea", "绿茶 tea is 好喝的饮料"]) == [False, True]
    assert lacks_spaces(["2019", "他去了学校"]) == [True, True]  # without letters: as the others
    assert lacks_spaces(["2019", "plain"]) == [False, False]
    assert lacks_spaces([]) == []


def test_units_are_characters_and_whole_foreign_words() -> None:
    assert split_units("GPT-4 很好，用了 25 天。") == ["GPT", "4", "很", "好", "用", "了", "25", "天"]
    assert split_units("ー・ア") == ["ー", "ア"]
    assert split_units("น้ำ") == list("น้ำ")


def test_tokenizers_of_bleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "find_spec", lambda name: None)
    chosen = [bleu_tokenizer(texts) for texts in (CHINESE, JAPANESE, THAI, KOREAN, ["words"], ["12"])]
    assert chosen == ["zh", "char", "char", "13a", "13a", "13a"]
    monkeypatch.setattr(scripts, "find_spec", lambda name: object())
    assert bleu_tokenizer(JAPANESE) == "ja-mecab"


def test_a_label_in_a_sentence_without_spaces_is_named() -> None:
    answers = ["答案是正面。", "我认为这是负面的", "非常正面", "正面还是负面？", "どちらでもない"] * 3
    references = ["正面", "负面", "非常正面", "正面", "负面"] * 3
    assert compute_measures("generation", answers, references)["accuracy"].value == 0.6
    assert label_named("unpositive", ["positive", "negative"]) is None


@needs_packages
@pytest.mark.parametrize(("text", "other"), [("की", "का"), ("தமிழ் மொழி", "தமிழ மொழு"), ("শিক্ষা", "শিক্ষি")])
def test_words_that_differ_in_a_vowel_sign_differ(text: str, other: str) -> None:
    values = [compute_measures("generation", [text], [one])["rouge_l"].value for one in (text, other)]
    assert values == [1.0, 0.0]
    marked = compute_measures("generation", ["❤️ 1_2"], ["1 2"])["rouge_l"]
    assert marked.value == 1.0


def test_near_identical_answers_are_near_one() -> None:
    assert token_f1("北京是中国首都", "北京是中国的首都。") == pytest.approx(2 * 7 / 15)
    assert token_f1("ฉันรักแมว", "ฉันรักแมวมาก") == pytest.approx(2 * 9 / 21)
    assert token_f1("나는 고양이를", "나는 고양이를 좋아해요") == pytest.approx(0.8)
    assert token_f1("東京", "大阪") == 0.0


@needs_packages
@pytest.mark.parametrize(
    ("texts", "tokenizer"), [(CHINESE, "zh"), (THAI, "char"), (KOREAN, "13a"), (JAPANESE, "ja-mecab")]
)
def test_rouge_and_bleu_are_those_of_their_packages(texts: list[str], tokenizer: str) -> None:
    if tokenizer == "ja-mecab":
        pytest.importorskip("MeCab", reason="words of Japanese: pip install sacrebleu[ja]")
        pytest.importorskip("ipadic", reason="words of Japanese: pip install sacrebleu[ja]")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return [c for c in text if c != "。"] if tokenizer != "13a" else text.split()

    answers = [text[1:] for text in texts]
    measures = compute_measures("generation", answers, texts)
    bleu = BLEU(force=True, tokenize=tokenizer).corpus_score(answers, [texts]).score / 100
    assert measures["bleu"].value == pytest.approx(bleu, abs=1e-9)
    scorer: Any = RougeScorer(["rougeL"], tokenizer=Characters())
    rouge = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(answers, texts, strict=True)]
    assert measures["rouge_l"].value == pytest.approx(sum(rouge) / len(rouge), abs=1e-9)
    by_character = "" if tokenizer == "13a" else "by character"
    assert (measures["token_f1"].note, measures["rouge_l"].note) == (by_character, by_character)
    assert measures["bleu"].note == ("" if tokenizer == "13a" else f"tokenizer {tokenizer}")
    titles = [change.title for change in compare(measures, measures).changes]
    assert metric_title("token_f1", by_character) in titles


def test_a_set_of_both_kinds_says_how_many() -> None:
    measures = compute_measures("generation", ["我喜欢茶", "a b"], ["我喜欢喝茶", "a b"], only=["token_f1"])
    assert measures["token_f1"].value == pytest.approx((2 * 4 / 9 + 1) / 2)
    assert metric_title("token_f1", measures["token_f1"].note) == "token F1 (1 of 2 by character)"
