"""report.html of a search and the pictures beside it, also while it runs."""
