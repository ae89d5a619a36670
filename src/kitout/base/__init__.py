"""The frozen model: the places where a value passes, found by structure and proven by a forward.

Sites, roles, the selection language, the probe and how weights are stored. It knows no adapter and no method.
The design and its reasons: docs/design.md.
"""
