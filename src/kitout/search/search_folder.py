"""The folder of a search: its plan, what was proposed and decided, a folder for each rung, the confirmation's run.

The same plan resumes the search; another one is refused by name, with both values. Everything is written whole or not
at all, and `search.json` last: its presence means that the search is finished. It knows names and files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitout.errors import ConfigError, Errors
from kitout.files.atomic import remove_leftovers, write_text
from kitout.files.system_errors import as_path
from kitout.search.plan.schema import SearchPlan
from kitout.train.config.yaml_file import read_yaml, to_yaml
from kitout.train.run_folder import ABSENT, LOCK_FILE, OWNER_FILE, flatten, lock_folder

PLAN_FILE, RESULTS_FILE, REPORT_FILE = "plan.yaml", "search.json", "report.html"
RECOMMENDED_FILE, TRIALS_FILE = "recommended.yaml", "trials.csv"
HEADER = "# Written by `kitout search`: the plan of the search in this folder."
MAY_DIFFER = ("out", "trials", "run.output.folder", "run.train.micro_batch_size", "run.train.save_steps")


@dataclass(frozen=True)
class SearchFolder:
    """The folder of one search, and the paths in it."""

    path: Path
    """The folder itself."""

    @property
    def results(self) -> Path:
        return self.path / RESULTS_FILE

    @property
    def confirmation(self) -> Path:
        """The folder of the run that confirms."""
        return self.path / "confirm"

    def rung(self, number: int, generation: int = 0) -> Path:
        """The folder of a rung; of the first one by generation."""
        return self.path / "rungs" / (f"{number}-{generation}" if generation else f"{number}")

    def read(self, name: str) -> Any:
        """What `write` has kept under a name; None: nothing yet."""
        file = self.path / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, name: str, values: Any) -> None:
        """Keeps plain values under a name."""
        write_text(self.path / f"{name}.json", json.dumps(values, indent=1, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file of the folder, whole or not at all."""
        write_text(self.path / name, text)


@contextmanager
def open_search_folder(plan: SearchPlan) -> Iterator[SearchFolder]:
    """The folder, locked by this process; ConfigError where it is in use, another plan's or something else's."""
    path = as_path(plan.out)
    file = path / PLAN_FILE
    if path.exists() and not path.is_dir():
        raise ConfigError(f"out={path}: it is a file; choose a folder")
    holds = {entry.name for entry in path.iterdir()} - {LOCK_FILE, OWNER_FILE} if path.exists() else set()
    if holds and PLAN_FILE not in holds and not all(name.startswith(f".{PLAN_FILE}.") for name in holds):
        shown = ", ".join(sorted(holds)[:4])
        raise ConfigError(
            f"{path} is not the folder of a search: it holds {shown}. Choose a new or empty folder for out"
        )
    path.mkdir(parents=True, exist_ok=True)
    with lock_folder(path):
        remove_leftovers(path, lambda name: name.endswith((".json", ".yaml", ".html", ".csv", ".png", ".svg")))
        if file.is_file():
            _check_same(path, read_yaml(file), plan.to_dict())
        write_text(file, f"{HEADER}\n{to_yaml(plan.to_dict())}")
        yield SearchFolder(path)


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    errors = Errors(ConfigError, f"{path} holds a search of another plan (choose another out, or delete it)")
    before, after = flatten(old), flatten(new)
    for name in dict.fromkeys([*after, *before]):
        there, asked = before.get(name, ABSENT), after.get(name, ABSENT)
        if there != asked and name not in MAY_DIFFER:
            texts = ["not set" if value is ABSENT else json.dumps(value) for value in (there, asked)]
            errors.add(f"{name}: {texts[0]} there, {texts[1]} requested")
    errors.raise_if_any()
