"""The datasets of one job: its encoded splits, and what reading them has shown.

`datasets` makes them from a config's sources; the loop, the evaluation and the pages read them. It knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kitout.data.encode.languages import Languages
from kitout.data.examples.examples import Example
from kitout.data.examples.formats import TableReading
from kitout.train.objectives.tasks import Task
from kitout.train.setup.closed_answers import ClosedAnswers


@dataclass(frozen=True)
class Datasets:
    """The splits of one job, encoded. An example of images is a row of `images`."""

    task: Task
    """What is trained: its entry in a table of tasks."""
    train: Sequence[Any]
    """What is trained on."""
    validation: Sequence[Any]
    """What is measured during training."""
    test: Sequence[Any]
    """What is measured once, at the end."""
    label_names: tuple[str, ...] = ()
    """The closed set of labels, in order."""
    mixture_ranges: tuple[range, ...] = ()
    """Which examples of train came from which source."""
    mixture_weights: tuple[float, ...] = ()
    """The weight of each source."""
    majority_accuracy: float | None = None
    """The fraction of test that always giving the majority class gets right; None without a closed set."""
    reading_notes: tuple[str, ...] = ()
    """How each source was read, then how all of them were split, in words."""
    digest: str = ""
    """A fingerprint of all examples."""
    test_digest: str = ""
    """A fingerprint of the test split as the data have it, whatever the tokenizer; empty without a test split."""
    preview: Sequence[Any] = ()
    """Of a stream: the examples that the pre-flight counts."""
    is_chat: bool = False
    """Whether the examples are chats."""
    images: Any = None
    """The ImageSet that rows are of; None: texts."""
    answers: ClosedAnswers | None = None
    """Of a language model whose answers are a closed set."""
    warnings: tuple[str, ...] = ()
    """What was assumed or changed when the sources were read, one sentence each."""
    languages: Languages | None = None
    """Of a sequence-to-sequence tokenizer that has languages."""
    skipped: Sequence[str] = ()
    """Bad rows that were left out, a message with file and line each."""
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By split: examples of alignment that do not fit and were left out, a message with file and line each."""
    reading: TableReading | None = None
    """How the first source was read; None: images."""
    sample: Example | None = None
    """Of the test split, else of another: what the end of the run shows as an input; None: images."""
    sampled_of: int | None = None
    """About how many examples there are to train on, where train is a sample of them (of a dry run)."""

    @property
    def objective(self) -> str:
        """The name of the task."""
        return self.task.name

    def reference_of(self, item: Any) -> Any:
        """The reference of an example, as the metrics of its task take it."""
        return self.task.reference_of(item, self.images)


def messages_by_split(messages: Sequence[str], ends: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Messages that came while train, validation and test were encoded. ends: how many there were after each."""
    splits = zip(("train", "validation", "test"), pairwise([0, *ends]), strict=True)
    return {name: tuple(messages[start:end]) for name, (start, end) in splits if end > start}
