"""What a search is to do: its plan, the space of designs, and the rungs that a budget affords."""
