"""A model asked many prompts."""
