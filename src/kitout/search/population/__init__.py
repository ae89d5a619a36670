"""The designs of a search as adapters that are trained together: proposed, trained, measured, dropped."""
