"""Sets of examples that are asked of a model by likelihood, the base's kept answers, suites of forgetting."""
