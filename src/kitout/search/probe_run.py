"""`kitout probe-sites`: the signals of a run's model, data and objective, as a table, JSON and a heat map.

It prepares the run as `kitout train` does and trains nothing. Only the first job of a run is looked at. It knows how a
run is prepared, and nothing of the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.files.atomic import write_text
from kitout.format import align_columns
from kitout.search.allocation import CRITERIA, Criterion, allocate_ranks
from kitout.search.heat_map import write_heat_maps
from kitout.signals.site_signals import Signals, SiteSignals
from kitout.train.config.schema import RunConfig
from kitout.train.objectives.signals_of_items import BATCH_SIZE, NUM_ITEMS, first_items, signals_of_items
from kitout.train.setup.find_inputs import check_inputs
from kitout.train.setup.prepare import prepare

SIGNALS_FILE = "signals.json"
SHOWN_DIRECTIONS = 8  # of the inputs, whose share the table has


@dataclass(frozen=True)
class SiteRanking:
    """What was found, and the ranks that follow from it."""

    signals: Signals
    """By site."""
    by: Criterion
    """What the table is sorted by."""
    budget: int
    """Trainable parameters of the ranks: as many as the run's method has at these sites with one rank for all."""
    ranks: dict[str, dict[str, int]]
    """Criterion -> path -> rank."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**self.signals.to_dict(), "budget": self.budget, "ranks": self.ranks}

    def __str__(self) -> str:
        """The sites, the most important first."""
        sites = list(self.signals.values())
        energy = sum(site.gradient_energy for site in sites) or 1.0
        fisher = sum(site.fisher_mass for site in sites) or 1.0
        products = sum(site.weight_gradient or 0.0 for site in sites) or 1.0
        has_products = any(site.weight_gradient is not None for site in sites)
        header = ["site", "role", "block", "gradient", "Fisher", "inputs"]
        rows = [(*header, *(["|W * G|"] if has_products else []), *(f"r {name}" for name in self.ranks))]
        for site in sorted(sites, key=self._importance, reverse=True):
            cells = [site.path, site.role, str(site.layer)]
            cells += [_percent(site.gradient_energy / energy), _percent(site.fisher_mass / fisher)]
            cells.append(_percent(sum(site.explained_variance[:SHOWN_DIRECTIONS])))
            cells += [_percent((site.weight_gradient or 0.0) / products)] if has_products else []
            rows.append((*cells, *(str(ranks[site.path]) for ranks in self.ranks.values())))
        lines = align_columns(rows)
        return "\n".join([*lines, "", *self._notes()])

    def _importance(self, site: SiteSignals) -> tuple[float, float]:
        """What the table is sorted by; sites of equal rank by their gradient."""
        by_gora = site.weight_gradient if self.by == "gora" else None
        first = float(self.ranks[self.by][site.path]) if self.by in ("eva", "uniform") else by_gora or 0.0
        return first, site.gradient_energy

    def _notes(self) -> list[str]:
        text = f"""\
{len(self.signals)} sites, {self.signals.num_batches} batches. gradient, Fisher: shares of |G|^2, and of its sum by row.
inputs: what the first {SHOWN_DIRECTIONS} directions of a site's inputs explain of them.
r: LoRA ranks with {self.budget:,} trainable parameters in all, by kitout.search.allocate."""
        notes = text.splitlines()
        return [*notes, *(f"left out: {path} ({reason})" for path, reason in self.signals.left_out.items())]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def probe_sites(
    config: RunConfig, *, by: Criterion = "gradient", num_examples: int = NUM_ITEMS, budget: int | None = None,
    gora: bool = False, log: Callable[[str], None] = print,
) -> SiteRanking:  # fmt: skip
    """The signals of the run's model on its first training examples. budget: of the ranks; None: rank 8 everywhere."""
    check_inputs(config)
    prepared = prepare(config, log=log)
    job, kit = prepared.jobs[0], prepared.kit
    if len(prepared.jobs) > 1:
        log(f"the run has {len(prepared.jobs)} jobs: these are the sites of {job.name}")
    items = prepared.first_dataset.preview or first_items(job.examples, job.batches, num_examples)
    heads = kit[job.name].heads_by_path()
    log(f"probing {len(items)} examples ...")
    size = min(BATCH_SIZE, len(items))
    signals = signals_of_items(kit, job.objective, items, size, heads=heads, gora=gora, seed=job.settings.seed)
    kit.detach()
    if budget is None:
        budget = sum(min(8, site.max_rank) * site.cost for site in signals.values())
    criteria = [name for name in CRITERIA if gora or name != "gora"]
    return SiteRanking(signals, by, budget, {name: allocate_ranks(signals, budget, name) for name in criteria})


def write_ranking(ranking: SiteRanking, folder: Path) -> list[Path]:
    """signals.json and the heat maps of blocks x roles."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SIGNALS_FILE
    write_text(file, json.dumps(ranking.to_dict(), indent=2) + "\n")
    return [file, *write_heat_maps(ranking.signals, ranking.ranks, folder)]
