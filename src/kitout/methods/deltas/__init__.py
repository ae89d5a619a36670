"""Deltas that several methods share."""
