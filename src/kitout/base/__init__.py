"""What is frozen: the places of a model where a value passes, found by structure and proven by a forward.

Sites, roles, the selection language, the probe and how weights are stored. Knows no adapter and no method.
The design and its reasons: docs/design.md.
"""
