"""How a run starts: what can be found out without torch first, then a line, then what takes seconds to import.

It knows that a run has names that may be wrong and a folder that may hold its results, and nothing of how it works.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kitout.train.config.schema import RunConfig
from kitout.train.setup.find_inputs import check_inputs

if TYPE_CHECKING:
    from kitout.train.run import Result

RESULTS_FILE = "results.json"  # of a run that is finished, which needs neither its base nor its data any more


def start(config: RunConfig, *, dry_run: bool = False, log: Callable[[str], None] = print) -> Result:
    """`run`, after what needs no torch. log: gets the lines to print."""
    if not (config.output.folder.expanduser() / RESULTS_FILE).is_file():
        check_inputs(config)
    if "transformers" not in sys.modules:
        log("loading transformers ...")
    from kitout.train.run import run

    return run(config, dry_run=dry_run, log=log)
