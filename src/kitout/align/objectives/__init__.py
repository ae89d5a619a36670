"""The objectives of the alignment stages, for the one training loop."""
