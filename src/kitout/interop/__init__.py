"""Thin glue to other libraries' trainers, where they need more than a model that is a kit."""
