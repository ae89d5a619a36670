"""Runs of tests without the drawing of their plots, which takes longer than training a tiny model.

Figures are made and laid out in full by the tests of `evaluate.report`, by those that ask for `drawn_plots`, and by
whatever runs in a process of its own. Import both names into a conftest or a module.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kitout.evaluate.report import class_plots, plots

BLANK = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a4944415478da63f80f00010101001cb08c990000000049454e44ae426082"
)
"""A PNG of one white pixel."""
DRAW = plots.to_png


@pytest.fixture(scope="module", autouse=True)
def blank_plots() -> Iterator[None]:
    """Figures are made as ever, and saved as one pixel."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, class_plots):
            patch.setattr(module, "to_png", lambda figure: BLANK)
        yield


@pytest.fixture
def drawn_plots(blank_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as a user gets them."""
    for module in (plots, class_plots):
        monkeypatch.setattr(module, "to_png", DRAW)
