"""What a run with several seeds has shown of its jobs, and the scores of single examples that any run keeps.

Made of what each adapter reached on its test split; a job's seeds are one method. It knows outcomes, and neither models
nor pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kitout.evaluate.example_scores import AdapterScores, keep_ratios, save_scores
from kitout.evaluate.significance.by_method import MetricByMethod, SeedScore, compare_by_method
from kitout.train.config.seeds import job_of
from kitout.train.measure.evaluate import JobOutcome
from kitout.train.setup.prepare import PreparedRun


def write_scores(run: PreparedRun, outcomes: Mapping[str, JobOutcome], file: Path) -> None:
    """The scores of every adapter with a test split, and of what it is compared with."""
    digests = {job.name: one.test_digest for job, one in zip(run.jobs, run.datasets, strict=True)}
    save_scores(
        file,
        {
            name: AdapterScores(
                digests[name], one.comparison.baseline, keep_ratios(one.measures), keep_ratios(one.base_measures)
            )
            for name, one in outcomes.items()
        },
    )


def metrics_by_method(run: PreparedRun, outcomes: Mapping[str, JobOutcome]) -> list[MetricByMethod]:
    """Every metric that all jobs have, the headline first; empty for a run without seeds or without a test split."""
    if not run.seeds or len(outcomes) < len(run.jobs):
        return []
    first, *others = outcomes.values()
    seed_of = {job.name: job.settings.seed for job in run.jobs}
    methods: dict[str, list[str]] = {}
    for name in outcomes:
        methods.setdefault(job_of(run.seeds, name), []).append(name)
    same_test = len({(one.test_digest, len(one.test)) for one in run.datasets}) == 1
    found = []
    for change in first.comparison.changes:
        metric = change.name
        if not all(metric in one.scores for one in others):
            continue
        changes = {name: next(c for c in one.comparison.changes if c.name == metric) for name, one in outcomes.items()}
        kept = {name: keep_ratios({metric: one.measures[metric]}) for name, one in outcomes.items()}
        seeds = {
            method: [
                SeedScore(name, seed_of[name], c.tuned.value, c.difference, c.low, c.high)
                for name in names
                for c in [changes[name]]
            ]
            for method, names in methods.items()
        }
        scores = {
            method: [one for name in names for one in kept[name].values()] for method, names in methods.items()
        }  # fmt: skip
        found.append(compare_by_method(
            metric, seeds, scores, share=change.tuned.share, baseline=first.comparison.baseline,
            why_not="" if same_test else "no verdict: the jobs have different test examples",
            measured=change.tuned.note,
        ))  # fmt: skip
    return found
