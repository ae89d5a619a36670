"""What stages of alignment are configured by: kinds, their losses, the schema, and how it is read."""
