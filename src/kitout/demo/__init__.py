"""The built-in models and data sets, which come through the package index, and the demos that use them.

`assets` fetches and converts what is needed; `text` is a preset of `kitout train`. Nothing here is imported by the rest
of kitout: the library does not know that the demo exists.
"""
