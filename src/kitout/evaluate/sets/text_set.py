"""Plain texts, scored by bits per byte, and by how far an adapter moved the base's predictions on them.

`evaluate.ask.text_likelihood` asks. It knows no source and no report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.ask.text_likelihood import check_texts, text_likelihoods
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.metrics.texts import TextSums
from kitout.evaluate.sets.evaluation_set import Asked, digest_of, grouped
from kitout.route import RouteEntry


@dataclass(frozen=True)
class TextSet:
    """Plain texts. divergence: how far predictions moved from the base's is measured too."""

    name: str
    """As the source names it."""
    texts: tuple[str, ...]
    """In order."""
    divergence: bool = False
    """Whether KL(base || adapter) is measured as well."""
    groups: tuple[str, ...] = ()
    """Of each, where several are about one thing; empty: every one stands for itself."""
    kind: ClassVar[str] = "text"
    shares_batches: ClassVar[bool] = True

    @property
    def digest(self) -> str:
        return digest_of([self.divergence, list(self.texts)])

    def __len__(self) -> int:
        return len(self.texts)

    def check(self, asked: Asked, routes: Sequence[RouteEntry]) -> None:
        """ConfigError where `ask` would raise one, without asking the model anything."""
        check_texts(asked.kit, asked.tokenizer, divergence=self.divergence)

    def ask(self, asked: Asked, routes: Sequence[RouteEntry], on_progress: ProgressFn | None) -> list[Any]:
        found = text_likelihoods(
            asked.kit, asked.tokenizer, self.texts, routes, divergence=self.divergence, on_progress=on_progress
        )
        return [[[t.nll, t.num_tokens, t.num_bytes, t.divergence] for t in texts] for texts in found]

    def constant(self) -> tuple[str, Any] | None:
        return None  # a language model has its head

    def measures(self, answers: Any) -> dict[str, Measure]:
        return grouped(compute_measures("text", [TextSums(*values) for values in answers]), self.groups)
