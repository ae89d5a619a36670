"""Numbers as text, and text that cannot act on a terminal."""

from __future__ import annotations

from kitout.format import (
    common_prefix_length,
    escape_terminal,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    single_line,
)


def test_numbers_and_text() -> None:
    assert [format_duration(s) for s in (0.04, 12.3, 61, 245, 7400, 3e5)] == [
        "0.0 s", "12 s", "61 s", "4:05 min", "2:03 h", "3 d 11 h"
    ]  # fmt: skip
    assert [format_bytes(n) for n in (12, 2048, 1.4e9, 2**40)] == ["12 B", "2.0 KiB", "1.3 GiB", "1.0 TiB"]
    assert [format_count(n) for n in (999, 9999, 12345, 1.5e6, 2e9)] == ["999", "9,999", "12.3 k", "1.5 M", "2 G"]
    assert [format_number(v) for v in (0.12345, 0, 1e-5, 3, None, True, 123456.0, 1234.5, 2e8)] == [
        "0.1235", "0", "1e-5", "3", "not finite", "True", "123,456", "1,234", "2e8"
    ]  # fmt: skip
    assert escape_terminal("a\tb\nc") == "a\tb\nc"
    assert escape_terminal("a\tb\nc", escape_newlines=True) == "a␉b␊c"
    assert escape_terminal("👩\u200d🔬 é नी") == "👩\u200d🔬 é नी"  # joiners are kept
    assert escape_terminal("\ud800\ufeff") == "\\ud800\\ufeff"
    assert single_line("a \n  b" + "c" * 100, 10) == "a bcccccc…"


def test_common_prefix_length() -> None:
    pairs = [("abc", "abd"), ("abc", "ab"), ("", "a"), ("abc", "abc"), ("x", "y")]
    assert [common_prefix_length(*pair) for pair in pairs] == [2, 2, 0, 3, 0]
