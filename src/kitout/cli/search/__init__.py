"""Verbs that say which design to choose: advise."""
