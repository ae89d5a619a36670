"""Classify tickets with MiniLM: a csv in, an adapter, predictions of a new csv out (docs/tickets.md, in Python).

Four hundred tweets take the place of tickets. `python examples/tickets.py [FOLDER]`; a few minutes on two cores.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import kitout
from kitout.assets.store import fetch_asset


def main(folder: Path) -> None:
    """Everything below one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (fetch_asset("tweets") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:420]]
    for name, part in {"tickets.csv": rows[:400], "new.csv": rows[400:]}.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(part)
    result = kitout.train(model="minilm", data=str(folder / "tickets.csv"), output={"folder": str(folder / "run")})
    print(result.comparisons["adapter"].verdict)
    predictor = kitout.load(folder / "run")
    for row, answer in zip(rows[400:], predictor([row["text"] for row in rows[400:]]), strict=True):
        print(f"{row['label']:>9}  {answer}  {row['text'][:60]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tickets"))
