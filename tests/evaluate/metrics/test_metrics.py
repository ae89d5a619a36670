"""Every metric is what the field's own packages say it is, on data with every kind of gap."""

from __future__ import annotations

import importlib.util
import math
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kitout.errors import ConfigError
from kitout.evaluate.metrics import generation
from kitout.evaluate.metrics.entities import entity_spans
from kitout.evaluate.metrics.generation import closed_labels, label_named, normalize_answer, token_f1
from kitout.evaluate.metrics.language import LossSums, sum_losses
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.registry import TITLES, score

DICE = np.random.default_rng(0)
TRUE = DICE.integers(0, 4, 300).tolist()
SAID = [t if DICE.random() < 0.6 else int(DICE.integers(0, 5)) for t in TRUE]  # 4 is said and never true

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed")
needs_bleu = pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed")


def within(found: dict[str, Score]) -> None:
    for name, s in found.items():
        assert s.low <= s.value <= s.high, name
        assert all(math.isfinite(v) for v in (s.low, s.value, s.high)), name
        assert name in TITLES


@needs_sklearn
def test_labels_as_scikit_learn_scores_them() -> None:
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    found = score("classification", SAID, TRUE)
    within(found)
    assert next(iter(found)) == "accuracy"
    assert found["accuracy"].value == pytest.approx(accuracy_score(TRUE, SAID))
    assert found["macro_f1"].value == pytest.approx(f1_score(TRUE, SAID, average="macro"))
    recalls = recall_score(TRUE, SAID, average="macro", labels=[0, 1, 2, 3])
    assert found["balanced_accuracy"].value == pytest.approx(recalls)
    named = score("classification", [f"l{s}" for s in SAID], [f"l{t}" for t in TRUE])
    assert named == found


@needs_sklearn
def test_multilabel_as_scikit_learn_scores_it() -> None:
    from sklearn.metrics import f1_score

    true = (DICE.random((100, 5)) < 0.3).astype(int)
    said = np.where(DICE.random((100, 5)) < 0.8, true, 1 - true)
    true[:, 4] = said[:, 4] = 0  # a label that nobody carries
    found = score("multilabel", said.tolist(), true.tolist())
    within(found)
    assert found["micro_f1"].value == pytest.approx(f1_score(true, said, average="micro"))
    assert found["macro_f1"].value == pytest.approx(f1_score(true, said, average="macro", zero_division=np.nan))
    assert found["exact_match"].value == pytest.approx((true == said).all(1).mean())


def test_multilabel_names_what_is_no_vector() -> None:
    with pytest.raises(ConfigError, match=r"example 1 is \[0.7, 1\], expected 2 values 0 or 1"):
        score("multilabel", [[0, 1], [0.7, 1]], [[0, 1], [0, 1]])
    with pytest.raises(ConfigError, match="predictions have 2 labels an example, references 3"):
        score("multilabel", [[0, 1]], [[0, 1, 1]])


@needs_scipy
def test_numbers_as_scipy_scores_them() -> None:
    from scipy.stats import pearsonr, spearmanr

    true = np.round(DICE.normal(0, 1, 200), 1)  # ties
    said = np.round(true + DICE.normal(0, 1, 200), 1)
    found = score("regression", said.tolist(), true.tolist())
    within(found)
    assert found["mae"].value == pytest.approx(np.abs(true - said).mean())
    assert found["rmse"].value == pytest.approx(np.sqrt(((true - said) ** 2).mean()))
    assert found["pearson"].value == pytest.approx(pearsonr(said, true).statistic)
    assert found["spearman"].value == pytest.approx(spearmanr(said, true).statistic)
    assert (found["mae"].higher_is_better, found["mae"].share) == (False, False)
    assert found["pearson"].higher_is_better


@needs_scipy
def test_a_draws_ranks_are_those_of_the_draw() -> None:
    from scipy.stats import spearmanr

    from kitout.evaluate.metrics.regression import regression_metrics

    true, said, times = DICE.integers(0, 6, 40), DICE.integers(0, 6, 40), DICE.integers(0, 4, 40)
    expected = spearmanr(np.repeat(said, times), np.repeat(true, times)).statistic
    figure = regression_metrics(said.tolist(), true.tolist())["spearman"].value_fn
    assert figure(times.astype(float)) == pytest.approx(expected)


def test_a_constant_answer_correlates_with_nothing() -> None:
    found = score("regression", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert (found["pearson"].value, found["spearman"].value) == (0.0, 0.0)
    with pytest.raises(ConfigError, match="example 1 is nan"):
        score("regression", [1.0, math.nan], [1.0, 2.0])


TAGS = [["B-per", "I-per", "O", "B-loc"], ["O", "I-org", "I-org", "I-per"], ["O", "O"], ["B-loc", "B-loc", "I-loc"]]


def test_spans_begin_where_a_kind_does() -> None:
    assert entity_spans(TAGS[0]) == {("per", 0, 1), ("loc", 3, 3)}
    assert entity_spans(TAGS[1]) == {("org", 1, 2), ("per", 3, 3)}  # no B-, and still two entities
    assert entity_spans(TAGS[2]) == set()
    assert entity_spans(TAGS[3]) == {("loc", 0, 0), ("loc", 1, 2)}
    assert entity_spans(["B", "I", "x-y"]) == set()


def test_entities_are_right_as_a_whole() -> None:
    said = [["B-per", "O", "O", "B-loc"], ["O", "I-org", "I-org", "O"], ["B-loc", "O"], TAGS[3]]
    found = score("tokens", said, TAGS)
    within(found)
    assert next(iter(found)) == "f1"
    assert found["precision"].value == pytest.approx(4 / 6)  # loc; org; loc, loc - and per cut short, loc made up
    assert found["recall"].value == pytest.approx(4 / 6)
    assert found["f1"].value == pytest.approx(4 / 6)
    assert found["token_accuracy"].value == pytest.approx(10 / 13)
    names = sorted({tag for tags in [*said, *TAGS] for tag in tags})
    numbers = [[[names.index(tag) for tag in tags] for tags in rows] for rows in (said, TAGS)]
    assert score("tokens", *numbers, names=names) == found


@needs_sklearn
def test_tags_without_entities() -> None:
    from sklearn.metrics import f1_score

    true = [["noun", "verb"], ["noun", "det", "noun"], ["verb"]]
    said = [["noun", "noun"], ["noun", "det", "verb"], ["adj"]]
    found = score("tokens", said, true)
    within(found)
    expected = f1_score([*chain(*true)], [*chain(*said)], average="macro")
    assert found["macro_f1"].value == pytest.approx(expected)
    with pytest.raises(ConfigError, match="example 1 has 1 predicted tags for 3 tokens"):
        score("tokens", [["noun", "verb"], ["noun"], ["verb"]], true)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat on a mat!", "cat sat on mat"),
        ("Positive.", "positive"),
        ("well-known (U.S.) fact", "wellknown us fact"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("1,000.50 dollars.", "1000.50 dollars"),
        ("3-5", "35"),
        ("A", "a"),
        ("the", "the"),
        ("+", "+"),
        ("!!!", "!!!"),
        ("Müller's Straße", "müllers straße"),
        ("", ""),
    ],
)
def test_normal(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_token_f1_counts_words_as_often_as_they_occur() -> None:
    assert token_f1("the cat sat", "cat sat down") == pytest.approx(2 * 2 / 5)
    assert token_f1("cat cat cat", "cat") == pytest.approx(2 / 4)
    assert (token_f1("", ""), token_f1("", "x"), token_f1("x", "x")) == (1.0, 0.0, 1.0)


def test_closed_sets_return() -> None:
    assert closed_labels(["Yes", "no", "yes.", "No", "yes", "no", "yes"]) == ["yes", "no"]
    assert closed_labels(["A", "B", "A", "C", "B", "C", "A", "C", "B"]) == ["a", "b", "c"]
    assert closed_labels(["yes"] * 9) == []  # nothing to tell apart
    assert closed_labels([f"answer {i}" for i in range(30)]) == []
    assert closed_labels([f"answer {i % 60}" for i in range(300)]) == []


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        ("the sentiment of this tweet is positive", "positive"),
        ("it is very positive indeed", "very positive"),  # the longer label names the shorter too
        ("positive or negative", None),
        ("unpositive", None),
        ("", None),
        ("i do not know", None),
    ],
)
def test_an_answer_is_read_as_the_only_label_it_names(answer: str, label: str | None) -> None:
    assert label_named(answer, ["positive", "negative", "very positive"]) == label


@needs_sklearn
def test_answers_from_a_closed_set_are_labels_too() -> None:
    from sklearn.metrics import f1_score

    names = ["negative", "neutral", "positive", "mixed"]
    true = [names[t] for t in TRUE]
    said = [f"It is {names[s]}." if s < 4 else "The sentiment is unclear" for s in SAID]
    found = score("generation", said, true)
    within(found)
    assert list(found) == ["accuracy", "macro_f1", "exact_match", "token_f1"]
    assert found["accuracy"].value == pytest.approx(np.mean(np.equal(SAID, TRUE)))
    assert found["exact_match"].value == 0
    expected = f1_score(TRUE, SAID, average="macro", labels=[0, 1, 2, 3])
    assert found["macro_f1"].value == pytest.approx(expected)
    assert found["token_f1"].value > found["exact_match"].value


def test_labels_that_are_known_need_not_return() -> None:
    found = score("generation", ["Red", "blue"], ["red", "green"], names=["red", "green", "blue"])
    assert found["accuracy"].value == 0.5
    assert found["macro_f1"].value == pytest.approx(1 / 3)  # red 1, green 0, and blue, which was said, 0
    assert "accuracy" not in score("generation", ["Red", "blue"], ["red", "green"])


OPEN_TRUE = [f"The {word} went to the market, and bought number {i}." for i, word in enumerate("abcdefgh")]
OPEN_SAID = ["The A went home", *OPEN_TRUE[1:4], "", "Un marché à Zürich", *OPEN_TRUE[6:]]


@needs_rouge
def test_rouge_as_rouge_score_has_it() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found = score("generation", OPEN_SAID, OPEN_TRUE, only=["rouge_l"])
    within(found)
    plain = RougeScorer(["rougeL"])
    expected = np.mean([plain.score(r, p)["rougeL"].fmeasure for p, r in zip(OPEN_SAID, OPEN_TRUE, strict=True)])
    assert found["rouge_l"].value == pytest.approx(expected)
    cyrillic = score("generation", ["кот сидел дома", "да"], ["кот сидел дома", "да"], only=["rouge_l"])
    assert cyrillic["rouge_l"].value == 1.0


@needs_bleu
def test_chrf_and_bleu_as_sacrebleu_has_them() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    found = score("generation", OPEN_SAID, OPEN_TRUE, only=["bleu", "chrf"])
    within(found)
    assert found["chrf"].value == pytest.approx(CHRF().corpus_score(OPEN_SAID, [OPEN_TRUE]).score / 100)
    assert found["bleu"].value == pytest.approx(BLEU().corpus_score(OPEN_SAID, [OPEN_TRUE]).score / 100)


def test_a_missing_package_is_told_and_an_error_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    heard: list[str] = []
    found = score("generation", OPEN_SAID, OPEN_TRUE, on_warning=heard.append)
    assert list(found) == ["token_f1", "exact_match"]
    assert heard == [
        "left out rouge_l, chrf, bleu: rouge-score and sacrebleu not installed\n  pip install 'kitout[eval]'"
    ]
    assert score("generation", OPEN_SAID, OPEN_TRUE) == found
    with pytest.raises(ConfigError, match=r"chrf: sacrebleu not installed\n  pip install 'kitout\[eval\]'"):
        score("generation", OPEN_SAID, OPEN_TRUE, only=["chrf"])


def test_a_language_model_is_scored_by_sums(tiny_llama: torch.nn.Module) -> None:
    ids = torch.randint(5, 99, (3, 9))
    labels = ids.clone()
    labels[0, :4] = labels[2] = -100  # the last example has nothing that counts
    with torch.no_grad():
        logits = tiny_llama(input_ids=ids).logits
    sums = sum_losses(logits[:, :-1], labels[:, 1:])
    assert [s.num_tokens for s in sums] == [5, 8, 0]
    flat, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(flat, wanted, ignore_index=-100)
    found = score("language", sums)
    within(found)
    assert found["loss"].value == pytest.approx(float(expected), rel=1e-6)
    assert found["perplexity"].value == pytest.approx(math.exp(float(expected)), rel=1e-6)
    right = (flat.argmax(-1) == wanted).sum() / (wanted != -100).sum()
    assert found["token_accuracy"].value == pytest.approx(float(right))
    together = LossSums(sum(s.loss for s in sums), 13, sum(s.num_correct for s in sums))
    assert score("language", [together])["loss"].value == pytest.approx(found["loss"].value)


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no task 'classify': did you mean 'classification'"):
        score("classify", [1], [1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are no predictions"):
        score("classification", [], [])
    with pytest.raises(ConfigError, match="2 predictions for 1 references"):
        score("classification", [1, 2], [1])
    with pytest.raises(ConfigError, match=r"classification has no metric 'acuracy' here: did you mean 'accuracy'"):
        score("classification", [1], [1], only=["acuracy"])
    with pytest.raises(ConfigError, match="none of the 1 examples has a token that counts"):
        score("language", [LossSums(0.0, 0, 0)])


def test_only_picks_and_keeps_the_order_asked_for() -> None:
    assert list(score("classification", SAID, TRUE, only=["macro_f1", "accuracy"])) == ["macro_f1", "accuracy"]
