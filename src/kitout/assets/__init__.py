"""Built-in small models and data sets."""
