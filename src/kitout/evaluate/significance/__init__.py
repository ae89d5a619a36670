"""How sure a comparison of methods is: over seeds, over many methods, over tasks, and what a test set can show at all.

Plain arrays of scores go in, frozen values with texts come out. `evaluate.metrics` has the intervals of one model and
of one difference on given examples. Nothing here knows a model, a run or a file.
"""
