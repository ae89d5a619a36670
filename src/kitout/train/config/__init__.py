"""What a run is configured by: the schema, and how it is read."""
