"""Runs every benchmark and prints one table; --write keeps it in benchmarks/RESULTS.md. Needs the `bench` extra.

`python benchmarks/run.py [train_step front idle many attaching] [--write] [--threads 2]`; each file says what it does.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
NAMES = ("attaching", "front", "idle", "many", "train_step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="which (default: all)")
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    from common import Line, machine

    lines: list[Line] = []
    for name in options.names or NAMES:
        for line in importlib.import_module(name).run():
            lines.append(line)
            mark = "yes" if line.reached else "NO"
            print(f"{mark:>3} {line.figure}: {line.measured} (asked {line.asked}) {line.detail}", flush=True)
    if options.write:
        (HERE / "RESULTS.md").write_text(table(lines, machine()), encoding="utf-8")
    return 0


def table(lines: list, where: str) -> str:
    rows = [f"| {r.figure} | {r.measured} | {r.asked} | {'yes' if r.reached else 'no'} | {r.detail} |" for r in lines]
    return "\n".join(
        [
            "# Benchmarks: the last run",
            "",
            f"`make bench ARGS=--write`, {date.today()}. {where}.",
            "Random values: SmolLM2-135M's shape for training and off, a 29.5 M Llama for loading and decoding.",
            "Cases of a row ran interleaved in one process on a shared machine; ratios are best round over best round.",
            "",
            "| figure | measured | asked | reached | |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
