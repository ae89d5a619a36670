"""Learning rates of the vision demo's methods, chosen on a validation part of MNIST-5k that is never the test part.

The demo's test images are taken off first, then a validation part from what is left, then as many training images as
the demo uses; each method is trained at each rate with the demo's budget. Finished trials are kept in runs/, so the
search can be stopped and run again. Prints one line per trial and the best rate of each method.

    python benchmarks/vision_search.py [--methods lora ssf] [--rates 1e-3 3e-3] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from kitout.demo.screen import Screen
from kitout.demo.vision import Options, Split, equip, one, parted, recipe_of
from kitout.demo.vision_rows import ROWS, chosen
from kitout.train.setup import device

VALIDATION = 400


def parts_without_test(options: Options, screen: Screen) -> Split:
    """Training and validation images, none of them among the demo's test images."""
    everything = parted(replace(options, train=10**9), screen).train
    return Split.of(everything, VALIDATION, options.train, seed=1)


def main() -> None:
    """Every method at every rate."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--methods", nargs="*", default=[], help=f"of {' '.join(ROWS)}; default: all")
    words.add_argument("--rates", nargs="*", type=float, default=[], help="default: the row's own, times 1/3, 1 and 3")
    words.add_argument("--head-rates", nargs="*", type=float, default=[], help="default: the row's own")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--out", type=Path, default=Path("runs/vision-search"))
    asked = words.parse_args()
    options, screen = Options(seed=0), Screen()
    parts = parts_without_test(options, screen)
    kit, pixels, _ = equip(options, parts, device.device(), screen)
    for row in chosen(asked.methods):
        trials: list[tuple[float, float, float]] = []
        for rate in asked.rates or [row.lr / 3, row.lr, row.lr * 3]:
            for head_rate in asked.head_rates or [row.head_lr]:
                tried = replace(row, lr=rate, head_lr=head_rate)
                name = f"{row.key}-{rate:.0e}-{head_rate:.0e}-{asked.seed}"
                done = asked.out / name / "result.json"
                if not done.exists():
                    recipe = recipe_of(tried, options.budget / len(parts.train), asked.seed)
                    one(kit, pixels, tried, recipe, parts, asked.out / name, name, screen, name)
                result = json.loads(done.read_text())
                trials.append((result["accuracy"], rate, head_rate))
                last = sum(result["training"]["losses"][-10:]) / 10
                screen.say(
                    f"{name}: {100 * result['accuracy']:.2f} % of {VALIDATION}, "
                    f"loss at the end {last:.3f}, {result['training']['seconds']:.0f} s"
                )
        best = max(trials)
        screen.say(f"{row.key}: best lr {best[1]:.0e}, head {best[2]:.0e} ({100 * best[0]:.2f} %)")


if __name__ == "__main__":
    main()
