"""What a run is told: the schema and how it is read."""
