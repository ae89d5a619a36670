"""GRPO with a reward of your own, a plain function (docs/align.md, in Python).

The policy is asked to count. A stage names the function by its module, `grpo:counts_right`, so that a killed run finds
it again. `python examples/grpo.py [FOLDER]`; some minutes on two cores. `gym:chain_sum` in the place of data and reward
takes a task of reasoning-gym instead.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kitout

PARTS = {("spiders", "legs"): 8, ("cars", "wheels"): 4, ("birds", "wings"): 2, ("guitars", "strings"): 6}


def counts_right(
    _prompts: Sequence[Any], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    """1 where the last number of an answer is right, 0.2 for another number, 0 for none; None: not judged."""
    rewards: list[float | None] = []
    for text, row in zip(completions, rows, strict=True):
        numbers = re.findall(r"\d+", text)
        right = row.get("answer")
        rewards.append(None if right is None else 1.0 if numbers and int(numbers[-1]) == right else 0.2 * bool(numbers))
    return rewards


def main(folder: Path) -> None:
    """Everything below one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [
        {"prompt": f"How many {part} do {number} {things} have? Answer with a number.", "answer": number * each}
        for (things, part), each in PARTS.items()
        for number in range(2, 20)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    sys.path.insert(0, str(Path(__file__).parent))  # where `grpo` is found from any folder
    result = kitout.align(
        stage="grpo", model="smollm2-135m",
        data={"train": str(folder / "prompts.jsonl"), "validation": 0, "test": 16},
        reward="grpo:counts_right", rollout={"prompts": 4, "samples": 8, "max_new_tokens": 12},
        train={"steps": 30}, output=str(folder / "run"),
    )  # fmt: skip
    print(result.comparisons["grpo"].verdict)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/grpo"))
