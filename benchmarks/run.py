"""Runs every benchmark and prints one table; --write keeps it in benchmarks/RESULTS.md. Needs the `bench` extra.

`python benchmarks/run.py [NAME ...] [--write] [--threads 2]`, NAME: align, assess, attaching, combine, compose, idle,
loop_step, many, search, text_trunk, train_step, training, virtual_tokens. Each file says what it does.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
NAMES = (
    "align", "assess", "attaching", "combine", "compose", "idle", "loop_step", "many", "search", "text_trunk",
    "train_step", "training", "virtual_tokens",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="which (default: all)")
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    parser.add_argument("--label", default="", help="of another kind of machine: the section gets it in its title")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    from common import Line, machine

    measured: dict[str, list[Line]] = {}
    for name in options.names or NAMES:
        for line in importlib.import_module(name).run():
            measured.setdefault(name, []).append(line)
            mark = "yes" if line.reached else "NO"
            print(f"{mark:>3} {line.metric}: {line.measured} (target {line.target}) {line.detail}", flush=True)
    if options.write:
        results = HERE / "RESULTS.md"
        by_name = sections(results.read_text(encoding="utf-8")) if results.exists() else {}
        label = f", {options.label}" if options.label else ""
        by_name |= {name + label: section(name + label, lines, machine()) for name, lines in measured.items()}
        order = [*(name for name in NAMES if name in by_name), *(name for name in by_name if name not in NAMES)]
        results.write_text(HEAD + "\n".join(by_name[name] for name in order), encoding="utf-8")
    return 0


HEAD = """# Benchmarks: the last runs

`make bench ARGS='--write'`, or `ARGS='idle --write'` for one section, which leaves the others as they are.
Random values: SmolLM2-135M's shape for train_step, virtual_tokens and idle, a 29.5 M Llama for compose, loading and
decoding; `training` has SmolLM2's real weights and real data.
Cases of a row ran interleaved in one process on a shared machine; ratios are best round over best round.

"""


def sections(text: str) -> dict[str, str]:
    """The sections of the file, by benchmark."""
    texts = text.split("\n## ")[1:]
    return {text.partition("\n")[0]: f"## {text.rstrip()}\n" for text in texts}


def section(name: str, lines: list, where: str) -> str:
    rows = [f"| {r.metric} | {r.measured} | {r.target} | {'yes' if r.reached else 'no'} | {r.detail} |" for r in lines]
    head = ["| metric | measured | target | reached | |", "|---|---|---|---|---|"]
    return "\n".join([f"## {name}", f"{date.today()}. {where}.", "", *head, *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
