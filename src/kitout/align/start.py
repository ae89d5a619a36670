"""How stages start: what can be found out without torch first, then a line, then what takes seconds to import.

It knows that stages have names that may be wrong and folders that may hold their results, and nothing of how they work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kitout.align.config.conflicts import find_remarks
from kitout.align.config.schema import AlignConfig
from kitout.align.find_inputs import check_align_inputs
from kitout.train.start import RESULTS_FILE

if TYPE_CHECKING:
    from kitout.train.run import Result


def start(config: AlignConfig, *, dry_run: bool = False, log: Callable[[str], None] = print) -> Result:
    """`run`, after what needs no torch. log: gets the lines to print."""
    runs = [run for run in config.runs() if not (run.output.folder.expanduser() / RESULTS_FILE).is_file()]
    check_align_inputs(config, runs)
    for remark in find_remarks(config):
        log(f"note: {remark}")
    if "transformers" not in sys.modules:
        log("loading transformers ...")
    from kitout.align.run import run

    return run(config, dry_run=dry_run, log=log)
