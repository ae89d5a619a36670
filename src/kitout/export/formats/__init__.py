"""The formats an adapter can be exported to: one file and one entry each. `kitout export --to NAME`."""

from kitout.export.formats.format import AdapterFormat
from kitout.export.formats.peft import PEFT

FORMATS: dict[str, AdapterFormat] = {entry.name: entry for entry in (PEFT,)}
