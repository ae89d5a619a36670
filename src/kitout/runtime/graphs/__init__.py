"""The blocks compiled, each with its active adapters."""
