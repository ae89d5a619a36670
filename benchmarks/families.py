"""kitout.check on tiny models of more than a hundred families: methods x laws, counted; FAMILIES.md is the last table.

`python benchmarks/families.py [--write] [--only NAME ...]` runs every family of family_configs.py in a process of its
own with a time limit, so that a crash or a hang of one is a line of the table. It prints what is wrong and every raw
error, each refusal once with the families it meets, and per method how many families refuse it. Exit status 1 if
anything is wrong, or if more is refused than the limits allow.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from family_configs import FAMILIES, Family, build

import kitout
from kitout import IA3, BitFit, Houlsby, LoRA, PrefixTuning, PromptTuning
from kitout.errors import KitoutError
from kitout.model_check.result import COLUMNS, CheckCell, ModelCheck

HERE = Path(__file__).parent
PROCESSES, TIMEOUT_SECONDS = 2, 240
METHODS = (
    LoRA(rank=4, targets="all-linear"),
    IA3(),
    Houlsby(width=8),
    PrefixTuning(length=4),
    PromptTuning(length=3),
    BitFit(),
)
NAMES = [type(method).__name__ for method in METHODS]
# Of 106 families, when the limits were set; more families may refuse in proportion.
LIMITS_OF = 106
MOST_REFUSED = {"LoRA": 7, "IA3": 13, "Houlsby": 11, "PrefixTuning": 26, "PromptTuning": 41}
MIN_FAMILIES, MIN_LORA = 100, 95
SHORT = {"ok": "ok", "refused": "refused", "wrong": "WRONG", "error": "ERROR", "not applicable": "-"}


@dataclass
class FamilyResult:
    """What one family gave."""

    name: str
    """transformers' `model_type`, or a timm name."""
    kind: str
    """decoder, encoder, ..."""
    seconds: float = 0.0
    """Time it took."""
    cells: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """method -> column -> the fields of a CheckCell."""
    notes: list[str] = field(default_factory=list)
    """What its base allows to compare."""
    base_error: str = ""
    """Why the bare base could not be built or run; then the family does not count."""

    def outcome(self, method: str, column: str) -> str:
        return self.cells[method][column]["outcome"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write FAMILIES.md")
    parser.add_argument("--only", nargs="*", default=[], help="these families")
    parser.add_argument("--json", type=Path, help="keep the results of finished families here, and go on from them")
    args = parser.parse_args()
    chosen = [f for f in FAMILIES if not args.only or f.name in args.only]
    done = {r["name"]: FamilyResult(**r) for r in _lines(args.json)}
    started = time.time()
    results = dict(done)
    for result in run_all([f for f in chosen if f.name not in done]):
        results[result.name] = result
        print(_progress(result), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    ordered = [results[f.name] for f in chosen if f.name in results]
    page, passed = report(ordered)
    print(page)
    print(f"{time.time() - started:.0f} s")
    if args.write:
        (HERE / "FAMILIES.md").write_text(page + "\n", encoding="utf-8")
    sys.exit(not passed)


def _lines(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


# ---- running ------------------------------------------------------------------------------------------------------


def run_all(families: list[Family]) -> Iterable[FamilyResult]:
    """Each in a forked process, two at a time; one that crashes or takes too long is reported as such."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once
    waiting, running = list(families), {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            family = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(family, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (family, process, time.time())
        ready = wait(list(running), timeout=1.0)
        for receiver, (family, process, since) in list(running.items()):
            late = time.time() - since > TIMEOUT_SECONDS
            if receiver not in ready and not late:
                continue
            try:
                result = receiver.recv() if receiver in ready else None
            except EOFError:
                result = None
            if result is None:
                process.kill()
                process.join()
                reason = "no answer in time" if late else f"the process died with {process.exitcode}"
                result = _all_cells(family, CheckCell("error", f"{reason} after {time.time() - since:.0f} s"))
            process.join()
            del running[receiver]
            yield result


def _child(family: Family, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    started = time.time()
    result = check_family(family)
    result.seconds = round(time.time() - started, 1)
    sender.send(result)


def check_family(family: Family) -> FamilyResult:
    """All methods on one family. An error of building or of the bare base is no result."""
    try:
        model = build(family)
        batch = None if family.batch is None else family.batch(model.config)
    except Exception as error:
        return FamilyResult(
            family.name, family.kind, base_error=f"not built: {type(error).__name__}: {str(error)[:200]}"
        )
    try:
        found: ModelCheck = kitout.check(model, METHODS, example_batch=batch)
    except KitoutError as error:
        if "the base itself" in str(error) or "no batch can be made up" in str(error):
            return FamilyResult(family.name, family.kind, base_error=str(error)[:300])
        return _all_cells(family, CheckCell("refused", str(error)))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno} in {place.name})"
        )
        return _all_cells(family, CheckCell("error", text))
    result = FamilyResult(family.name, family.kind, notes=list(found.notes))
    for (method, column), cell in found.cells.items():
        result.cells.setdefault(method, {})[column] = asdict(cell)
    return result


def _all_cells(family: Family, cell: CheckCell) -> FamilyResult:
    """One cell for every method's effect; nothing else could be asked."""
    rest = asdict(CheckCell("not applicable"))
    cells = {name: {c: asdict(cell) if c == "effect" else rest for c in COLUMNS} for name in NAMES}
    return FamilyResult(family.name, family.kind, cells=cells)


def _progress(result: FamilyResult) -> str:
    if result.base_error:
        return f"{result.name}: {result.base_error}"
    cells = ["/".join(SHORT[result.outcome(m, c)][:2] for c in COLUMNS) for m in NAMES]
    return f"{result.name:24} {result.seconds:6.1f} s  " + "  ".join(cells)


# ---- the page -----------------------------------------------------------------------------------------------------


def report(results: list[FamilyResult]) -> tuple[str, bool]:
    """FAMILIES.md, and whether the bounds hold."""
    counted = [r for r in results if r.cells]
    lines = [
        "# Families",
        "",
        f"`python benchmarks/families.py --write`: kitout.check on tiny random models of {len(counted)} families of",
        f"transformers {version('transformers')} and timm. A cell is effect / rows / merge / save / cache; `-` is",
        "nothing to compare (no weights give a bottleneck or a prompt, or the base has no cache). Refused families are",
        f"held against {', '.join(f'{m} {n}' for m, n in MOST_REFUSED.items())} of {LIMITS_OF}, in proportion.",
        "",
        "| method | " + " | ".join(COLUMNS) + " | refused, at most |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    passed = len(counted) >= MIN_FAMILIES
    for method in NAMES:
        counts = {c: Counter(r.outcome(method, c) for r in counted) for c in COLUMNS}
        refused = counts["effect"]["refused"]
        limit = MOST_REFUSED.get(method)
        if limit is not None:
            limit = limit * max(LIMITS_OF, len(counted)) // LIMITS_OF
        passed &= limit is None or refused <= limit
        passed &= not any(counts[c][bad] for c in COLUMNS for bad in ("wrong", "error"))
        cells = [", ".join(f"{n} {SHORT[o]}" for o, n in sorted(counts[c].items())) for c in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} | {refused}, {'no limit' if limit is None else limit} |")
    works = sum(r.outcome("LoRA", "effect") == "ok" for r in counted)
    passed &= works >= MIN_LORA
    lines += [
        "",
        f"LoRA on all linears works on {works} families, at least {MIN_LORA}.",
        "",
        "## Wrong, and raw errors",
        "",
    ]
    faults = [(r.name, m, c, r.cells[m][c]) for r in counted for m in NAMES for c in COLUMNS
              if r.outcome(m, c) in ("wrong", "error")]  # fmt: skip
    lines += [f"- {name}, {m}, {c}: {cell['outcome']}: {_plain(cell['message'])}" for name, m, c, cell in faults] or [
        "None."
    ]
    lines += ["", "## Refusals", ""]
    reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for r in counted:
        for m in NAMES:
            for c in COLUMNS:
                if r.outcome(m, c) == "refused":
                    reasons[m, c, _plain(r.cells[m][c]["message"])].append(r.name)
    for method in NAMES:
        for column in COLUMNS:
            for (m, c, text), families in reasons.items():
                if (m, c) == (method, column):
                    lines.append(f"- {m}, {c}: {', '.join(families)}: {text}")
    lines += ["", "## Every family", "", f"| family | kind | {' | '.join(NAMES)} |", "|---|---|" + "---|" * len(NAMES)]
    for r in counted:
        cells = [" / ".join(SHORT[r.outcome(m, c)] for c in COLUMNS) for m in NAMES]
        lines.append(f"| {r.name} | {r.kind} | {' | '.join(cells)} |")
    left_out = [f"- {r.name}: {_plain(r.base_error)}" for r in results if not r.cells]
    lines += ["", "## Bases that did not run by themselves", "", *(left_out or ["None."])]
    uncompared = [
        f"- {r.name}: {_plain(note)}" for r in counted for note in r.notes if "depend" in note or "does not run" in note
    ]
    lines += ["", "## Rows that cannot be compared", "", *(uncompared or ["None."])]
    return "\n".join(lines), passed


def _plain(message: str) -> str:
    """One line, numbers of layers made alike, so that the same reason of two families is the same text."""
    flat = re.sub(r"\s+", " ", message)
    return flat if len(flat) <= 330 else flat[:329] + "…"


if __name__ == "__main__":
    main()
