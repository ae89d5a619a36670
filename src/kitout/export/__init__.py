"""Adapters for others: merged into a plain transformers folder, or written in the format of another library."""

from kitout.export.exported_adapter import ExportedAdapter, export_adapter
from kitout.export.merged_folder import MergedFolder, merge_to_folder

__all__ = ["ExportedAdapter", "MergedFolder", "export_adapter", "merge_to_folder"]
