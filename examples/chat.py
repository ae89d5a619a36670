"""Instruction-tune SmolLM2 and talk to it, then merge it into a plain model (docs/chat.md, in Python).

`python examples/chat.py [FOLDER]`; a few minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kitout
from kitout.export import merge_to_folder


def main(folder: Path) -> None:
    """Everything below one folder."""
    kitout.train(
        model="smollm2-135m",
        data={"train": {"path": "chat", "limit": 300}, "max_length": 256, "test": 20, "validation": 20},
        output={"folder": str(folder / "run")},
    )
    predictor = kitout.load(folder / "run")
    for name in (None, predictor.names[0]):
        predictor.use(name)
        print(f"{name}: {predictor.chat('Name three things that float.', max_new_tokens=40)}")
    merge_to_folder([folder / "run"], folder / "merged")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/chat"))
