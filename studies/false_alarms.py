"""How often two equal methods differ, by four ways to put two standard errors together (docs/design.md, evaluate.md).

`python studies/false_alarms.py [--times 1000000]`. A difference has the error of its seeds, estimated on few degrees of
freedom, and that of its examples. Printed is the share of false alarms over the level: 1 is exact, above 1 is too many.
It draws normal numbers, and trains nothing.
"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np

from kitout.evaluate.intervals.distributions import t_quantile
from kitout.format import align_columns

RATIOS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 20.0)  # of the seeds' standard error to the examples'
LEVELS = {"0.05": 0.05, "0.05 / 91": 0.05 / 91}
SEEDS = (3, 5, 10)
EXAMPLES = 299  # degrees of freedom
RULES = ("larger error", "Satterthwaite", "square and add", "examples alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1_000_000)
    times = parser.parse_args().times
    rows: list[tuple[str, ...]] = [("level", "seeds", "rule", *(f"errors 1 : {ratio:g}" for ratio in RATIOS))]
    for name, level in LEVELS.items():
        for num_seeds in SEEDS:
            found = [false_alarms(level, num_seeds, ratio, times) for ratio in RATIOS]
            rows += [(name, f"{num_seeds}", rule, *(f"{one[rule] / level:.2f}" for one in found)) for rule in RULES]
    sys.stdout.write("\n".join([*align_columns(rows), ""]))


def false_alarms(level: float, num_seeds: int, ratio: float, times: int) -> dict[str, float]:
    """By rule, the share of equal methods that differ."""
    rng, degrees = np.random.default_rng(0), 2 * num_seeds - 2
    difference = np.abs(rng.normal(0, math.hypot(1, ratio), times))
    seeds = ratio**2 * rng.chisquare(degrees, times) / degrees
    examples = rng.chisquare(EXAMPLES, times) / EXAMPLES
    of_seeds, of_examples = (t_quantile(1 - level / 2, one) for one in (degrees, EXAMPLES))
    both = (seeds + examples) ** 2 / (seeds**2 / degrees + examples**2 / EXAMPLES)
    grid = np.geomspace(degrees, degrees + EXAMPLES, 200)
    quantiles = np.interp(both, grid, [t_quantile(1 - level / 2, float(one)) for one in grid])
    half_widths = {
        "larger error": of_seeds * np.sqrt(np.maximum(seeds, examples)),
        "Satterthwaite": quantiles * np.sqrt(seeds + examples),
        "square and add": np.sqrt(of_seeds**2 * seeds + of_examples**2 * examples),
        "examples alone": of_examples * np.sqrt(examples),
    }
    return {rule: float((difference > half).mean()) for rule, half in half_widths.items()}


if __name__ == "__main__":
    main()
