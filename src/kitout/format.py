"""Numbers and untrusted text for the screen: counts, sizes, durations, columns; text that cannot act on a terminal.

Data come from anywhere. Escape sequences, control characters and characters that change the direction of writing are
made visible, never obeyed. It knows no console and no run.
"""

from __future__ import annotations

import math
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

ALLOWED_CONTROLS = "\n\t"
# Of what people name themselves and files are named after: an adapter.
ADAPTER_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ADAPTER_NAME_RULE = "use 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit"


def format_count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g} {unit}"
    return f"{value:,.0f}"


def format_bytes(num_bytes: float) -> str:
    """Bytes, in powers of 1024."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.{1 if num_bytes < 100 * 1024**power else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def format_duration(value: float) -> str:
    """12.3 s, 4:05 min, 2:03 h, 3 d 4 h."""
    if not math.isfinite(value):
        return "not known"
    if value < 99.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_number(value: Any, sign: bool = False) -> str:
    """Four significant digits, thousands separated; None as text. sign: with a plus if it is positive."""
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape_terminal(str(value))
    plus = "+" if sign else ""
    if isinstance(value, int):
        return f"{value:{plus},}"
    if value == 0 or 1e-3 <= abs(value) < 1e3 or not math.isfinite(value):
        return f"{value:{plus}.4g}"
    if 1e3 <= abs(value) < 1e7:
        return f"{value:{plus},.0f}"
    mantissa, exponent = f"{value:{plus}.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def escape_terminal(text: str, escape_newlines: bool = False) -> str:
    """The text with everything visible that a terminal would act on. escape_newlines: newlines and tabs too."""
    return "".join(c if c in ALLOWED_CONTROLS and not escape_newlines else _escape_char(c) for c in text)


def _escape_char(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)  # ESC -> ␛
    if code == 0x7F:
        return "␡"
    if char in "\u200c\u200d":  # joiners inside words and emoji
        return char
    if unicodedata.category(char) in (
        "Cc",
        "Cf",
        "Cs",
        "Zl",
        "Zp",
    ):  # C1, directions, surrogates, separators
        return f"\\u{code:04x}"
    return char


def single_line(text: str, max_chars: int = 80) -> str:
    """Escaped, white space collapsed to single blanks, at most max_chars characters."""
    flat = re.sub(r"\s+", " ", escape_terminal(text)).strip()
    return flat if len(flat) <= max_chars else flat[: max_chars - 1] + "…"


class _BoundedRepr(reprlib.Repr):
    """The start of a value, in little time however large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 4, 12, 12, 12
        self.maxstring = self.maxother = self.maxlong = 400


_BOUNDED_REPR = _BoundedRepr()


def short_repr(value: object, max_chars: int = 200) -> str:
    """The value as Python writes it, its start if that is long: for a value from outside, in a message."""
    text = _BOUNDED_REPR.repr(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def common_prefix_length(first: str, second: str) -> int:
    """The number of characters that both begin with. (`os.path.commonprefix` is deprecated from Python 3.15 on.)"""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def align_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned text."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
