"""What the demo leaves behind: the table and answers on the screen, results.json, and a picture where matplotlib is.

It prints figures it is given and computes none. It knows no model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kitout.demo.score import Measured
from kitout.demo.screen import Screen
from kitout.evaluate.report import plots


def figures(m: Measured) -> dict[str, Any]:
    return {
        "accuracy": m.accuracy,
        "interval95": list(m.interval),
        "balanced_accuracy": m.balanced,
        "right": m.right,
        "texts": len(m.chosen),
        "seconds": m.seconds,
        "tokens": m.tokens,
    }


def write(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, file)


def show(screen: Screen, results: dict[str, Any], adapter: Path, picture: Path | None) -> None:
    base, tuned, done = results["base"], results["tuned"], results["training"]
    whole = round(100 * results["adapter"]["trainable"] / results["adapter"]["percent"])
    rows = [
        [f"accuracy on {base['texts']} held-out texts", _share(base["accuracy"]), _share(tuned["accuracy"])],
        ["  95 % confidence interval", _range(base), _range(tuned)],
        ["  always the most frequent label", _share(results["majority"]), ""],
        ["  mean over labels", _share(base["balanced_accuracy"]), _share(tuned["balanced_accuracy"])],
        ["trainable parameters", "0", f"{results['adapter']['trainable']:,}"],
        [f"  of {whole:,}", "0 %", f"{results['adapter']['percent']:.2f} %"],
        ["seconds to train", "", f"{done['seconds']:.0f}"],
        ["  processor seconds, all threads", "", f"{done['processor_seconds']:.0f}"],
        ["  tokens per second", "", f"{done['tokens'] / max(done['seconds'], 1e-9):,.0f}"],
        ["seconds to measure", f"{base['seconds']:.0f}", f"{tuned['seconds']:.0f}"],
        ["  tokens per second", _speed(base), _speed(tuned)],
        ["peak memory", _gib(base["peak_bytes"]), _gib(tuned["peak_bytes"])],
    ]
    screen.say()
    screen.table("The same frozen model, without and with the adapter", ["", "base", "tuned"], rows)
    answers = [[a["text"].replace("\n", " "), a["label"], a["base"], a["tuned"]] for a in results["answers"]]
    screen.table("What both write (first held-out texts of each label)", ["text", "truth", "base", "tuned"], answers)
    for line in _closing(results, adapter, picture):
        screen.say(line)


def _closing(results: dict[str, Any], adapter: Path, picture: Path | None) -> list[str]:
    merged, model = results["merged"], results["model"]
    lines = [
        f"merged into the weights ({merged['dtype']}): {merged['same']} of {merged['asked']} answers and labels same; "
        "unmerged, the base is "
        + ("back bit for bit" if merged["restored_bit_for_bit"] else "NOT back bit for bit: please report this"),
        _verdict(results),
    ]
    if "caveat" in model:
        lines.append(f"note: {model['name']}: {model['caveat']}")
    lines += [
        "",
        f"adapter: {adapter} ({results['adapter']['bytes'] / 2**20:.1f} MiB)",
        f"figures: {adapter.parent / 'results.json'}" + (f", {picture.name}" if picture else ""),
        "next: the same on your own texts (columns text and label):",
        "  kitout demo --data FILE.jsonl   or   make demo DATA=FILE.csv MODEL=FOLDER",
        "wear it in Python:",
        "  from transformers import AutoModelForCausalLM; import kitout",
        f"  kit = kitout.attach(AutoModelForCausalLM.from_pretrained({model['folder']!r}))",
        f"  kit.load({str(adapter)!r}, name='demo'); kit.use('demo')",
    ]
    return lines


def _verdict(results: dict[str, Any]) -> str:
    low, high = results["tuned"]["interval95"][0], max(results["base"]["interval95"][1], results["majority"])
    if low > high:
        return "the tuned model is better than the base and than the most frequent label (intervals apart)"
    return "the intervals touch: this run does not show that the adapter helps; more texts (--train) or epochs may"


def picture(file: Path, results: dict[str, Any]) -> Path | None:
    """Loss by step and both accuracies with their intervals; None without matplotlib."""
    if not plots.possible():
        return None
    drawn = plots.figure(9, 3.2)
    left, right = drawn.subplots(1, 2)
    losses = results["training"]["losses"]
    left.plot(range(1, len(losses) + 1), losses, linewidth=1)
    left.set(xlabel="step", ylabel="loss on the answer's tokens", title="training")
    both = [results["base"], results["tuned"]]
    middle = [m["accuracy"] for m in both]
    reach = [[m["accuracy"] - m["interval95"][0] for m in both], [m["interval95"][1] - m["accuracy"] for m in both]]
    right.bar(["base", "tuned"], middle, yerr=reach, capsize=6, color=["0.7", "tab:blue"])
    right.axhline(results["majority"], linestyle="--", color="0.3", linewidth=1)
    right.set(ylim=(0, 1), ylabel="accuracy", title="held-out texts (dashed: most frequent label)")
    return plots.write(file, plots.png(drawn))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _range(m: dict[str, Any]) -> str:
    low, high = m["interval95"]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _speed(m: dict[str, Any]) -> str:
    return f"{m['tokens'] / max(m['seconds'], 1e-9):,.0f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
