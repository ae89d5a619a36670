"""Fusion by arithmetic: sums of adapters across methods, conversion between methods, extraction from a checkpoint."""
