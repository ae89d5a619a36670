"""How adapters run on the base: Deltas at sites, routes, rows, stacks and mixes, merging, counting.

Everything here is written once over `Delta`; no method is named. Start reading at `delta.py`, then `kit.py`.
"""
