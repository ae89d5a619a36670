"""Questions with choices, each choice scored by its likelihood: accuracy as lm-evaluation-harness has it.

`evaluate.ask.choices` asks. It knows no source and no report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.ask.choices import PLAIN, ChoicePrompt, ChoiceQuestion, check_choices, choice_likelihoods
from kitout.evaluate.metrics.choice_accuracy import ChoiceSums
from kitout.evaluate.metrics.measure import Measure
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.sets.evaluation_set import Asked, digest_of, grouped
from kitout.route import RouteEntry


@dataclass(frozen=True)
class ChoiceSet:
    """Questions with choices."""

    name: str
    """As the source names it."""
    questions: tuple[ChoiceQuestion, ...]
    """In order."""
    prompt: ChoicePrompt = PLAIN
    """How they are put."""
    groups: tuple[str, ...] = ()
    """Of each, where several are about one thing; empty: every one stands for itself."""
    kind: ClassVar[str] = "choice"
    shares_batches: ClassVar[bool] = True

    @property
    def digest(self) -> str:
        return digest_of([asdict(self.prompt), [asdict(question) for question in self.questions]])

    def __len__(self) -> int:
        return len(self.questions)

    def check(self, asked: Asked, routes: Sequence[RouteEntry]) -> None:
        """ConfigError where `ask` would raise one, without asking the model anything."""
        check_choices(asked.kit, asked.tokenizer, self.questions, routes, prompt=self.prompt)

    def ask(self, asked: Asked, routes: Sequence[RouteEntry], on_progress: ProgressFn | None) -> list[Any]:
        found = choice_likelihoods(
            asked.kit, asked.tokenizer, self.questions, routes, prompt=self.prompt, on_progress=on_progress
        )
        return [[[list(row.log_likelihoods), list(row.num_characters)] for row in rows] for rows in found]

    def constant(self) -> tuple[str, Any] | None:
        return None  # a language model has its head

    def measures(self, answers: Any) -> dict[str, Measure]:
        rows = [ChoiceSums(tuple(values), tuple(lengths)) for values, lengths in answers]
        measures = compute_measures("choice", rows, [question.answer for question in self.questions])
        return grouped(measures, self.groups)
