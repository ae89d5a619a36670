"""The embedded default: a real small model and real data that come through the package index, and one run.

`assets` fetches and converts what is needed; `run` trains, measures and shows. Nothing here is imported by the rest of
kitout: the library does not know that the demo exists.
"""
