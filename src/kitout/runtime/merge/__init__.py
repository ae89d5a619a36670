"""Adapters folded into weights, in place or in a copy."""
