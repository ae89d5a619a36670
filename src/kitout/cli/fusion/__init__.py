"""The verbs that make one adapter of others: combine, convert, extract."""
