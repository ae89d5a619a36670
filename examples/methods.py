"""VPT-deep against AdaptFormer on images, side by side with intervals (docs/compare-methods.md, in Python).

Digits take the place of your images. `python examples/methods.py [FOLDER]`; about ten minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kitout


def main(folder: Path) -> None:
    """Everything below one folder."""
    result = kitout.train(
        model="dinov2-small",
        data={"train": {"path": "mnist-5k", "limit": 400}, "image_size": 56},
        jobs=[
            {"name": "vpt-deep", "method": {"name": "VPT", "deep": True}},
            {"name": "adaptformer", "method": "AdaptFormer"},
        ],
        output={"folder": str(folder / "run")},
    )
    for name, comparison in result.comparisons.items():
        print(name, comparison.verdict)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/methods"))
