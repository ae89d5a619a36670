"""Learning rates of the vision demo's methods, chosen on a validation part of MNIST-5k that is never the test part.

The demo's split takes the test images off first; the validation images come from what is left, then as many training
images as the demo uses. Each method is trained at each rate with the demo's budget, all rates of a method in one run.
A search that was stopped goes on when it is started again. Prints one line per trial and the best rate.

    python benchmarks/vision_search.py [--methods lora ssf] [--rates 1e-3 3e-3] [--seed 1]
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from kitout.assets import store
from kitout.data.images.image_set import ImageSet
from kitout.data.read.image_folders import load_images as images_of
from kitout.data.split import split
from kitout.demo.vision import DATA, JOBS, VisionDemo
from kitout.demo.vision import preset as demo_config
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.run import run

VALIDATION = 400


def without_test(folder: Path, test: int) -> Path:
    """The embedded set without the demo's test images, as files and a table that `kitout train` reads."""
    table = folder / "images.csv"
    if table.is_file():
        return table
    whole = images_of(store.fetch_asset(DATA) / "images.npz")
    left: ImageSet = split(whole, test, None, 0).train
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(left)):
        left.open(i).save(folder / f"{i}.png")
    fresh = folder / ".images.csv"
    with fresh.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label"), *((f"{i}.png", left.label_names[left.labels[i]]) for i in
                                                          range(len(left)))])  # fmt: skip
    fresh.replace(table)
    return table


def trials(name: str, table: Path, asked: argparse.Namespace) -> RunConfig:
    """One run of the preset's settings in which each job is one pair of rates."""
    preset = demo_config(VisionDemo(methods=(name,), train=500, test=VALIDATION, seed=1))
    (job,) = preset.jobs
    assert job.train is not None
    assert job.train.lr is not None
    said = preset.to_dict()
    own = said["jobs"][0]
    rates = asked.rates or [job.train.lr / 3, job.train.lr, job.train.lr * 3]
    head_rates = asked.head_rates or [preset.train.head_lr]
    said["jobs"] = [
        own | {"name": f"{name}-{rate:.0e}-{head:.0e}", "train": own["train"] | {
            "lr": rate, "head_lr": rate if name == "linear" else head,  # a probe is its head
        }}
        for rate in rates for head in head_rates
    ]  # fmt: skip
    said["data"]["train"][0]["path"] = str(table)
    said["data"]["image_size"] = demo_config(VisionDemo()).data.image_size
    said["train"]["seed"] = asked.seed
    tried = "-".join(f"{rate:.0e}" for rate in [*rates, *(asked.head_rates or [])])
    said["output"]["folder"] = str(asked.out / f"{name}-{asked.seed}-{tried}")
    return load(said)


def main() -> None:
    """Every method at every rate."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--methods", nargs="*", default=[], choices=list(JOBS), help="default: all")
    words.add_argument("--rates", nargs="*", type=float, default=[], help="default: the preset's, times 1/3, 1 and 3")
    words.add_argument("--head-rates", nargs="*", type=float, default=[], help="default: the preset's own")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--out", type=Path, default=Path("runs/vision-search"))
    asked = words.parse_args()
    table = without_test(asked.out / "images", test=demo_config(VisionDemo()).evaluate.max_test_examples)
    for name in asked.methods or JOBS:
        chosen = trials(name, table, asked)
        run(chosen, log=lambda _words: None)
        results = json.loads((chosen.output.folder / "results.json").read_text())
        for row in results["adapters"]:
            print(f"{row['name']}: {100 * row['score']['value']:.2f} % of {VALIDATION}, {row['seconds']:.0f} s")
        best = max(results["adapters"], key=lambda row: row["score"]["value"])
        print(f"{name}: best {best['name']} ({100 * best['score']['value']:.2f} %)")


if __name__ == "__main__":
    main()
