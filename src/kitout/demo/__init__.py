"""The demos: presets of `kitout train` and `kitout align` over the built-in models and data sets.

Only the command line imports them: the library does not know that the demos exist.
"""
