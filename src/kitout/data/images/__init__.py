"""Image sets to pixels."""
