"""The base's answers, kept in the cache: it is asked once for each set of examples, whatever is measured afterwards.

`kept_answers` says on what they depend and how they are kept. It knows no metric.
"""

from __future__ import annotations

from typing import Any

from kitout.assets.store import cache_dir
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet
from kitout.evaluate.sets.kept_answers import answers_file, read_answers, write_answers


def base_answers(asked: Asked, what: EvaluationSet, on_progress: ProgressFn | None = None, keep: bool = True) -> Any:
    """The base's answers to a set: those that are kept, or asked now and then kept. keep: False does neither."""
    file = answers_file(cache_dir() / "base-answers", asked, what, None) if keep else None
    found = read_answers(file, len(what))
    if found is not None:
        return found
    (answers,) = what.ask(asked, [None], on_progress)
    write_answers(file, len(what), answers)
    return answers
