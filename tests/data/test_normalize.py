"""What is ignored when texts are compared, by option."""

from __future__ import annotations

from kitout.data.normalize import normalize_text


def test_case_width_and_white_space_are_ignored() -> None:
    assert normalize_text("Ａ\tb\n") == "a b"
    assert normalize_text("Straße") == normalize_text("STRASSE")
    assert normalize_text("3 + 4") != normalize_text("3 * 4")


def test_lower_case_alone() -> None:
    assert normalize_text("Ａ  Straße", fold_unicode=False) == "ａ straße"


def test_words_only() -> None:
    assert normalize_text("The 1,000 cats, a dog!", words_only=True) == "1000 cats dog"
    assert [normalize_text(t, words_only=True) for t in ("A", "-1.5", "well-known.", "+")] == [
        "a",
        "-1.5",
        "wellknown",
        "+",
    ]


def test_punctuation_of_any_script() -> None:
    pairs = [
        ("北京是首都。", "北京是首都"),
        ("「東京」です", "東京です"),
        ("نعم؟", "نعم"),
        ("¿Sí?", "sí"),
        ("“don’t”", "don't"),
    ]
    assert all(normalize_text(a, words_only=True) == normalize_text(b, words_only=True) for a, b in pairs)
    assert normalize_text("٣٫٥، ３．５。", fold_unicode=False, words_only=True) == "٣٫٥ ３．５"
    assert normalize_text("。", words_only=True) == "。"
