"""The vision demo from end to end: one frozen image model, many methods, the same images and the same budget for each.

Everything it prints was computed in this run or, for a method that an interrupted run of the same settings has already
finished, in that one, and it says so. It knows the order of the work; how each part is done is beside it.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kitout
from kitout import Kit
from kitout.assets import store
from kitout.assets.catalog import ASSETS
from kitout.data.images.image_set import Images
from kitout.data.images.pixels import Pixels
from kitout.data.read.image_folders import load
from kitout.data.read.tables import DataError
from kitout.data.split import split_images
from kitout.demo import report, vision_report
from kitout.demo.run import print_of
from kitout.demo.screen import Screen
from kitout.demo.vision_rows import Row, chosen
from kitout.evaluate.metrics.interval import wilson
from kitout.train.forward import STRETCH
from kitout.train.images import Progress, Recipe, fit, predict
from kitout.train.setup import device

MODEL, DATA, SIZE = "dinov2-small", "mnist-5k", 112


@dataclass(frozen=True)
class Options:
    """model and data None: the embedded ones. budget: images shown to each method while it learns.

    size: of the square the model sees; None: 112 for the embedded model, else what its image processor makes.
    """

    model: Path | None = None
    data: Path | None = None
    image: str | None = None
    label: str | None = None
    methods: tuple[str, ...] = ()
    out: Path = Path("runs/vision")
    size: int | None = None
    train: int = 500
    test: int = 1000
    budget: int = 1500
    seed: int = 0


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Does it all and returns what `results.json` holds."""
    rows = chosen(options.methods)
    parts = parted(options, screen)
    where = device.device()
    kit, pixels, about = equip(options, parts, where, screen)
    screen.say(
        f"{len(rows)} method{'s' if len(rows) > 1 else ''}; each is shown {options.budget:,} training images "
        f"({options.budget / len(parts.train):.3g} epochs) and measured on {len(parts.test):,}"
    )
    results = {
        "model": about,
        "data": _described(options, parts),
        "settings": {"budget": options.budget, "seed": options.seed},
        "machine": device.describe(where) | {"dtype": "float32"},
        "majority": parts.majority,
        "names": list(parts.test.names),
        "truth": list(parts.test.labels),
        "rows": _all(kit, pixels, rows, parts, options, screen, about["fingerprint"]),
    }
    report.write(options.out / "results.json", results)
    pictures = vision_report.pictures(options.out, results, parts.test)
    vision_report.show(screen, results, options.out, pictures)
    kit.detach()
    return results


@dataclass(frozen=True)
class Split:
    """Disjoint by pixels. dropped: duplicates left out."""

    train: Images
    test: Images
    dropped: int
    majority: float

    @classmethod
    def of(cls, images: Images, test: int, train: int | None, seed: int) -> Split:
        splits = split_images(images, 0, test, seed, train)
        dropped = splits.num_duplicates + splits.num_leaks
        return cls(images.pick(splits.train), images.pick(splits.test), dropped, splits.majority_accuracy or 0.0)


def parted(options: Options, screen: Screen) -> Split:
    path = options.data or store.get(DATA, screen.say) / "images.npz"
    screen.say(f"{path.name}: opening every image once")
    parts = Split.of(load(path, options.image, options.label), options.test, options.train, options.seed)
    screen.say(
        f"{len(parts.train):,} images to learn from, {len(parts.test):,} held out ({parts.dropped:,} duplicates left "
        f"out); {len(parts.test.names)} classes: {', '.join(parts.test.names[:12])}"
    )
    return parts


def equip(options: Options, parts: Split, where: torch.device, screen: Screen) -> tuple[Kit, Pixels, dict[str, Any]]:
    """The frozen model, the way to its pixels, and what is worth noting about it."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    folder = options.model or store.get(MODEL, screen.say)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is no model folder: it holds no config.json (a model saved by save_pretrained does)")
    size = options.size or (SIZE if options.model is None else None)
    pixels = Pixels.of(folder, size)
    names = dict(enumerate(parts.test.names))
    logging.disable_progress_bar()
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is what we want
    torch.manual_seed(options.seed)  # of that head, which the linear probe starts from
    try:
        model = AutoModelForImageClassification.from_pretrained(
            folder, id2label=names, label2id={v: k for k, v in names.items()}, ignore_mismatched_sizes=True,
            dtype=torch.float32,
        ).to(where)  # fmt: skip
    except (OSError, ValueError) as wrong:
        raise DataError(f"{folder} does not load as an image classifier: {str(wrong)[:300]}") from wrong
    finally:
        logging.set_verbosity(loud)
    kit = kitout.attach(model, example_batch=_example(model, pixels(parts.train, range(min(2, len(parts.train))))))
    kit.eval()
    about: dict[str, Any] = {"folder": str(folder), "fingerprint": print_of(kit), "size": size}
    if options.model is None:
        about |= {"name": MODEL, "caveat": ASSETS[MODEL].caveat}
    return kit, pixels, about


def _example(model: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """Two images at the size that will be used: far fewer tokens than the size the model was built for."""
    stretched = {STRETCH: True} if STRETCH in inspect.signature(model.forward).parameters else {}
    return {"pixel_values": pixels.to(model.device)} | stretched


def _described(options: Options, parts: Split) -> dict[str, Any]:
    return {
        "path": str(options.data) if options.data else DATA,
        "seed": options.seed,
        "train": len(parts.train),
        "test": len(parts.test),
        "duplicates": parts.dropped,
        "train_sha256": parts.train.digest,
        "test_sha256": parts.test.digest,
    }


def _all(
    kit: Kit, pixels: Pixels, rows: Sequence[Row], parts: Split, options: Options, screen: Screen, base: str
) -> list[dict[str, Any]]:
    results, spent = [], []
    for number, row in enumerate(rows, start=1):
        recipe = recipe_of(row, options.budget / len(parts.train), options.seed)
        same = _same(row, recipe, parts, pixels, base)
        held = _held(options.out / row.key, same)
        if held:
            screen.say(f"{row.title}: finished by an earlier run with the same settings, not done again")
            results.append(held)
            continue
        start = time.perf_counter()
        result = one(
            kit, pixels, row, recipe, parts, options.out / row.key, same, screen, f"{row.title} ({number}/{len(rows)})"
        )
        spent.append(time.perf_counter() - start)
        results.append(result)
        left = len(rows) - number
        more = f"; about {max(1, round(left * sum(spent) / len(spent) / 60))} min for the other {left}" if left else ""
        low, high = (100 * side for side in result["interval95"])
        screen.say(f"{row.title}: {100 * result['accuracy']:.1f} % ({low:.1f} to {high:.1f}){more}")
    return results


def recipe_of(row: Row, epochs: float, seed: int) -> Recipe:
    return Recipe(lr=row.lr, head_lr=row.head_lr, decay=row.decay, epochs=epochs, seed=seed)


def one(
    kit: Kit, pixels: Pixels, row: Row, recipe: Recipe, parts: Split, out: Path, same: str, screen: Screen, title: str
) -> dict[str, Any]:
    """Trains and measures one method, keeps its adapter and its result, and takes it off the kit again."""
    kit.add(row.key, row.method, seed=recipe.seed, heads=row.heads(kit, len(parts.train.names), recipe.seed))
    count = kit.num_parameters(row.key)
    file = out / "checkpoint.safetensors"
    with screen.phase(f"{title}: training") as bar:

        def tell(done: Progress) -> None:
            loss = sum(done.losses[-10:]) / max(1, len(done.losses[-10:]))
            resumed = f"resumed at {done.resumed_at[-1]}  " if done.resumed_at else ""
            bar(done.step, done.steps, f"{resumed}loss {loss:.3f}")

        trained = fit(kit, row.key, parts.train, pixels, recipe, file, same, tell)
    start = time.perf_counter()
    with screen.phase(f"{title}: measuring") as bar:
        guesses = predict(kit, row.key, parts.test, pixels, lambda done, total: bar(done, total, "")).argmax(1).tolist()
    seconds = time.perf_counter() - start
    right = sum(guess == label for guess, label in zip(guesses, parts.test.labels, strict=True))
    kit.save(
        row.key, out / "adapter", metadata={"trained by": "kitout demo vision", "classes": list(parts.train.names)}
    )
    result = {
        "run": same,
        "key": row.key,
        "title": row.title,
        "method": {type(row.method).__name__: row.method.describe()},
        "head": row.head or vision_report.OWN,
        "recipe": asdict(recipe),
        "trainable": count.trainable,
        "percent": count.percent,
        "bytes": count.bytes,
        "right": right,
        "images": len(guesses),
        "accuracy": right / len(guesses),
        "interval95": list(wilson(right, len(guesses))),
        "training": asdict(trained),
        "test_seconds": seconds,
        "guesses": guesses,
    }
    report.write(out / "result.json", result)
    file.unlink(missing_ok=True)
    kit.remove(row.key)
    return result


def _same(row: Row, recipe: Recipe, parts: Split, pixels: Pixels, base: str) -> str:
    """What must agree for a checkpoint to be gone on with and for a result to be taken as done."""
    return json.dumps(
        {
            "row": [row.key, type(row.method).__name__, row.method.model_dump(mode="json"), row.head],
            "recipe": asdict(recipe),
            "model": base,
            "size": pixels.size,
            "train": parts.train.digest,
            "test": parts.test.digest,
            "versions": [kitout.__version__, torch.__version__, sys.byteorder],
        }
    )


def _held(out: Path, same: str) -> dict[str, Any] | None:
    """The result of a method that is finished, its adapter kept beside it."""
    try:
        held: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if held.get("run") == same and (out / "adapter").is_dir() else None
