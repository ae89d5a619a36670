"""Verbs that decide where adapters go and how large they are."""
