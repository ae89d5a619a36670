"""Evaluation of adapter and base."""
