"""How often two equal methods differ, by four ways to put two standard errors together (docs/design.md, evaluate.md).

`python studies/false_alarms.py [--times 1000000]`. A difference has the error of its seeds, estimated on few degrees of
freedom, and that of its examples. Printed is the share of false alarms over the level: 1 is exact, above 1 is too many.
It draws normal numbers, and trains nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import product

import numpy as np

from kitout.evaluate.intervals.distributions import t_quantile
from kitout.format import align_columns

RATIOS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 20.0)  # of the seeds' standard error to the examples'
LEVELS = {"0.05": 0.05, "0.05 / 91": 0.05 / 91}
SEEDS = ((3, 3), (5, 5), (10, 10), (3, 10))
SPREADS = ((1.0, 1.0), (1.0, 0.3), (1.0, 0.0))  # of the two methods, over their seeds
EXAMPLES = 299  # degrees of freedom
RULES = ("larger error", "Satterthwaite", "square and add", "examples alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1_000_000)
    times = parser.parse_args().times
    rows: list[tuple[str, ...]] = [
        ("level", "seeds", "spreads", "rule", *(f"errors {ratio:g} : 1" for ratio in RATIOS))
    ]  # fmt: skip
    for (name, level), seeds, spreads in product(LEVELS.items(), SEEDS, SPREADS):
        found = [false_alarms(level, seeds, spreads, ratio, times) for ratio in RATIOS]
        setting = (name, "{} and {}".format(*seeds), "{:g} : {:g}".format(*spreads))
        rows += [(*setting, rule, *(f"{one[rule] / level:.2f}" for one in found)) for rule in RULES]
    sys.stdout.write("\n".join([*align_columns(rows), ""]))


def false_alarms(
    level: float, num_seeds: tuple[int, int], spreads: tuple[float, float], ratio: float, times: int
) -> dict[str, float]:
    """By rule, the share of equal methods that differ."""
    rng, fewest = np.random.default_rng(0), 2 * min(num_seeds) - 2
    difference = np.abs(rng.normal(0, math.hypot(1, ratio), times))
    own = [spread**2 / number for spread, number in zip(spreads, num_seeds, strict=True)]
    parts = [
        ratio**2 * one / sum(own) * rng.chisquare(number - 1, times) / (number - 1)
        for one, number in zip(own, num_seeds, strict=True)
    ]
    seeds, pooled = parts[0] + parts[1], sum(num_seeds) - 2
    examples = rng.chisquare(EXAMPLES, times) / EXAMPLES
    of_parts = sum(one**2 / (number - 1) for one, number in zip(parts, num_seeds, strict=True))
    welch = np.minimum(seeds**2 / of_parts, fewest) if ratio else np.full(times, float(fewest))
    satterthwaite = (seeds + examples) ** 2 / (seeds**2 / pooled + examples**2 / EXAMPLES)
    grid = np.geomspace(1, pooled + EXAMPLES, 400)
    at_grid = [t_quantile(1 - level / 2, float(one)) for one in grid]
    of_examples = t_quantile(1 - level / 2, EXAMPLES)
    half_widths = {
        "larger error": t_quantile(1 - level / 2, pooled) * np.sqrt(np.maximum(seeds, examples)),
        "Satterthwaite": np.interp(satterthwaite, grid, at_grid) * np.sqrt(seeds + examples),
        "square and add": np.sqrt(np.interp(welch, grid, at_grid) ** 2 * seeds + of_examples**2 * examples),
        "examples alone": of_examples * np.sqrt(examples),
    }
    return {rule: float((difference > half).mean()) for rule, half in half_widths.items()}


if __name__ == "__main__":
    main()
