"""Runs the benchmarks in their short form and holds every line against its bound; exits 1 where one is worse.

`python benchmarks/run.py [NAME ...] [--full] [--write] [--threads 2]`. The short form of all is meant to take
15 minutes on two cores, and a run says where it takes more; --full has all rounds and all cases, --write keeps the
table in RESULTS.md, that of a short form beside the full one. Needs the `bench` extra.
Bounds are in bounds.toml (`guard.py`). Each file says what it measures.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# One benchmark a line: what its `run` is called with in the short form.
SHORT: dict[str, dict[str, object]] = {
    "align": {"rounds": 1},
    "assess": {"rounds": 1},
    "attaching": {},
    "combine": {"sites": 16},
    "compiled": {"rounds": 2, "layers": 8},
    "compose": {"rounds": 6},
    "gpu": {},
    "idle": {"rounds": 6},
    "joint": {"rounds": 2, "blocks": 6, "steps": 4},
    "loop_step": {"rounds": 2},
    "many": {"rounds": 8},
    "methods_step": {"rounds": 2, "layers": 8},
    "search": {"rounds": 1},
    "text_trunk": {"rounds": 1},
    "train_step": {"rounds": 2},
    "training": {"rounds": 2, "short": True},
    "virtual_tokens": {"rounds": 2, "blocks": 8},
}
FULL: dict[str, dict[str, object]] = {"search": {"length": "full"}}  # the same, where the default is not the long form
NAMES = tuple(SHORT)
MOST_SECONDS = 15 * 60  # of the short form
SHORT_LABEL = ", short form"  # in the title of its section


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="which (default: all)")
    parser.add_argument("--full", action="store_true", help="all rounds and cases, which takes hours")
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    parser.add_argument("--label", default="", help="of another kind of machine: the section gets it in its title")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    from common import Line, machine
    from guard import BROKEN, judge, read_bounds

    bounds = read_bounds()
    measured: dict[str, list[Line]] = {}
    failed: list[str] = []
    began = time.perf_counter()
    for name in options.names or NAMES:
        start = time.perf_counter()
        module = importlib.import_module(name)
        if reason := getattr(module, "not_measured", str)():
            print(f"    {name}: not measured: {reason}", flush=True)
            continue
        measured[name] = []
        try:
            for line in module.run(**(FULL.get(name, {}) if options.full else SHORT[name])):
                measured[name].append(line)
                mark = "yes" if line.reached else "NO"
                bound = bounds.get(name, {}).get(line.metric)
                target = f"target {bound.target if bound and bound.target else line.target}, bound {bound}"
                print(f"{mark:>3} {line.metric}: {line.measured} ({target}) {line.detail}", flush=True)
        except Exception:  # of any kind: the others are measured all the same
            traceback.print_exc()
            failed.append(name)
        print(f"    {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if options.write:
        results = HERE / "RESULTS.md"
        by_name = sections(results.read_text(encoding="utf-8")) if results.exists() else {}
        label = (f", {options.label}" if options.label else "") + ("" if options.full else SHORT_LABEL)
        by_name |= {
            name + label: section(name + label, lines, machine())
            for name, lines in measured.items()
            if name not in failed
        }
        places = {name: place for place, name in enumerate(NAMES)}
        order = sorted(by_name, key=lambda title: places.get(title.split(",")[0], len(NAMES)))
        results.write_text(HEAD + "\n".join(by_name[name] for name in order), encoding="utf-8")
    code, messages = judge(measured, bounds, options.full)
    if failed:
        code = BROKEN
        messages.append(f"ended with an error, see above: {', '.join(failed)}")
    for message in messages:
        print(message)
    seconds = time.perf_counter() - began
    outcome = "see above" if code else "all within their bounds"
    print(f"{sum(map(len, measured.values()))} lines in {seconds:.0f} s: {outcome}")
    if not options.full and seconds > MOST_SECONDS:
        print(f"more than {MOST_SECONDS} s: shorten a form in run.py, or the machine was busy")
    return code


HEAD = """# Benchmarks: the last runs

`make bench ARGS='--full --write'`, or `ARGS='idle --full --write'` for one section, which leaves the others.
`make bench` alone runs the short forms and exits 1 where a line is worse than its bound in
`bounds.toml`; `--write` keeps them in sections of their own.
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
