"""Learning rates of the vision demo's methods, chosen on a validation split of MNIST-5k that is never the test split.

The demo's test images are removed first. The validation images come from the rest, then as many training images as the
demo uses. Each method is trained at each rate with the demo's budget, all rates of a method in one run.
A search that was stopped resumes when it is started again. Prints one line per trial and the best rate.

    python benchmarks/vision_search.py [--methods lora ssf] [--rates 1e-3 3e-3] [--seed 1]
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from kitout.assets import store
from kitout.data.read.image_folders import load_images
from kitout.data.split import split_images
from kitout.demo.vision import DATA, JOBS, VisionDemo
from kitout.demo.vision import preset as demo_config
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.run import run

VALIDATION = 400


def without_test(folder: Path, test: int) -> Path:
    """The built-in data set without the demo's test images, as files and a table that `kitout train` reads."""
    table = folder / "images.csv"
    if table.is_file():
        return table
    images = load_images(store.fetch_asset(DATA) / "images.npz")
    rest = images.subset(split_images(images, validation=0, test=test, seed=demo_config(VisionDemo()).data.seed).train)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(rest)):
        rest.open(i).save(folder / f"{i}.png")
    temporary = folder / ".images.csv"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label"), *((f"{i}.png", rest.label_names[rest.labels[i]])
                                                          for i in range(len(rest)))])  # fmt: skip
    temporary.replace(table)
    return table


def trials(name: str, table: Path, options: argparse.Namespace) -> RunConfig:
    """One run of the preset's settings in which each job is one pair of rates."""
    preset = demo_config(VisionDemo(methods=(name,), train=500, test=VALIDATION, seed=1))
    (job,) = preset.jobs
    assert job.train is not None
    assert job.train.lr is not None
    settings = preset.to_dict()
    job_settings = settings["jobs"][0]
    rates = options.rates or [job.train.lr / 3, job.train.lr, job.train.lr * 3]
    head_rates = options.head_rates or [preset.train.head_lr]
    settings["jobs"] = [
        job_settings | {"name": f"{name}-{rate:.0e}-{head:.0e}", "train": job_settings["train"] | {
            "lr": rate, "head_lr": rate if name == "linear" else head,  # a probe is its head
        }}
        for rate in rates for head in head_rates
    ]  # fmt: skip
    settings["data"]["train"][0]["path"] = str(table)
    settings["data"]["image_size"] = demo_config(VisionDemo()).data.image_size
    settings["train"]["seed"] = options.seed
    tried = "-".join(f"{rate:.0e}" for rate in [*rates, *(options.head_rates or [])])
    settings["output"]["folder"] = str(options.out / f"{name}-{options.seed}-{tried}")
    return load(settings)


def main() -> None:
    """Every method at every rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=[], choices=list(JOBS), help="default: all")
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="default: the preset's, times 1/3, 1 and 3")
    parser.add_argument("--head-rates", nargs="*", type=float, default=[], help="default: the preset's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/vision-search"))
    options = parser.parse_args()
    table = without_test(options.out / "images", test=demo_config(VisionDemo()).evaluate.max_test_examples)
    for name in options.methods or JOBS:
        run_config = trials(name, table, options)
        run(run_config, log=lambda _text: None)
        results = json.loads((run_config.output.folder / "results.json").read_text())
        for row in results["adapters"]:
            print(f"{row['name']}: {100 * row['score']['value']:.2f} % of {VALIDATION}, {row['seconds']:.0f} s")
        best = max(results["adapters"], key=lambda row: row["score"]["value"])
        print(f"{name}: best {best['name']} ({100 * best['score']['value']:.2f} %)")


if __name__ == "__main__":
    main()
