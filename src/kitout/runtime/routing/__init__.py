"""Which adapter is active, for whom."""
