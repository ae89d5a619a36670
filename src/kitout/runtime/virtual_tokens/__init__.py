"""Prompts, prefixes and visual prompts: positions that are in no text."""
