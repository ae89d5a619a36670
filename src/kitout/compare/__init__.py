"""Finished runs side by side: what `kitout compare` prints. `compare_runs(folders)` gives the table."""

from kitout.compare.page import write_folder
from kitout.compare.run_table import RunTable, compare_runs, write_csv

__all__ = ["RunTable", "compare_runs", "write_csv", "write_folder"]
