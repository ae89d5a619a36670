"""report.html, the model card, plots and the adapter table."""
