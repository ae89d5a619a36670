"""Steps, optimizer, processes."""
