"""Rows to examples in words."""
