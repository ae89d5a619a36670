"""Folders of finished runs without any training: what `kitout train` writes of them, with scores of one's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kitout.evaluate.example_scores import AdapterScores, ExampleScores, save_scores
from kitout.evaluate.metrics.measure import proportion
from kitout.train.config import yaml_file
from kitout.train.config.load import load
from kitout.train.run_folder import HEADER


def score(value: float, n: int = 100, share: bool = True, higher: bool = True) -> dict[str, Any]:
    low, high = value - 0.05, value + 0.05
    return {"value": value, "low": low, "high": high, "n": n, "higher_is_better": higher, "share": share}


def finished(
    folder: Path, metrics: dict[str, float], *, seed: int = 0, method: Any = "LoRA", jobs: tuple[str, ...] = (),
    model: str = "tiny", n: int = 100, train_seeds: Sequence[int] = (), names: Sequence[str] = (),
    methods: dict[str, Any] | None = None, file: str = "data.csv", **results: Any,
) -> Path:  # fmt: skip
    """A run with these metrics on its test split, the same for each job."""
    folder.mkdir(parents=True)
    values: dict[str, Any] = {
        "model": model, "data": file, "method": method,
        "train": {"seeds": list(train_seeds)} if train_seeds else {"seed": seed},
        "output": {"folder": str(folder)},
    }  # fmt: skip
    if jobs:
        values["jobs"] = [{"name": name, **({"method": methods[name]} if methods else {})} for name in jobs]
    config = load(values)
    (folder / "run.yaml").write_text(f"{HEADER}\n{yaml_file.to_yaml(config.to_dict())}", encoding="utf-8")
    names = names or jobs or ("adapter",)
    changes = [
        {"name": name, "base": score(value / 2, n), "tuned": score(value, n), "difference": value / 2, "low": 0.0,
         "high": 1.0, "baseline": "majority class"}
        for name, value in metrics.items()
    ]  # fmt: skip
    whole: dict[str, Any] = {
        "data": dict.fromkeys(names, "all"), "test_data": dict.fromkeys(names, "test"),
        "trainable": dict.fromkeys(names, 1234), "percent": dict.fromkeys(names, 0.5), "seconds": 12.5,
        "memory": 2**30, "machine": {"device": "cpu: x", "dtype": "float32"}, "stopped": {},
        "comparisons": dict.fromkeys(names, changes) if changes else {},
        "adapters": [{"name": name, "method": "LoRA", "seconds": 5.0} for name in names],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(whole | results), encoding="utf-8")
    return folder


def ranked(
    folder: Path, accuracies: dict[str, float], *, seed: int = 0, test: str = "test", n: int = 100, start: int = 0,
    **more: Any,
) -> Path:  # fmt: skip
    """A run of these jobs with seeds 0, 1, 2 (or of one method, with one seed) that keeps the scores of examples."""
    scores, names, seeds = {}, [], {}
    for number, (job, accuracy) in enumerate(accuracies.items()):
        adapters = {f"{job}-s{s}": s for s in range(3)} if len(accuracies) > 1 else {"adapter": seed}
        if len(accuracies) > 1:
            seeds[job] = adapters
        for name, own_seed in adapters.items():
            correct = np.random.default_rng([start, number, own_seed]).random(n) < accuracy
            kept = ExampleScores.of(proportion(correct))
            assert kept is not None
            scores[name] = AdapterScores(test, "majority class", {"accuracy": kept}, {})
            names.append(name)
    more |= {"train_seeds": [0, 1, 2]} if seeds else {}
    methods = {job: str((more.get("methods") or {}).get(job, "LoRA")) for job in accuracies}
    texts = {name: methods[job] for job, own in seeds.items() for name in own} or {"adapter": methods.popitem()[1]}
    more.setdefault("adapters", [{"name": name, "method": text, "seconds": 5.0} for name, text in texts.items()])
    finished(folder, {"accuracy": 0.5}, seed=seed, jobs=tuple(accuracies) if seeds else (), n=n, names=names,
             test_data=dict.fromkeys(names, test), seeds={"adapters": seeds}, **more)  # fmt: skip
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name, one in scores.items():
        change = dict(results["comparisons"][name][0])
        value = one.tuned["accuracy"].measure.value
        results["comparisons"][name] = [change | {"tuned": score(value, n)}]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    save_scores(folder / "scores.safetensors", scores)
    return folder
