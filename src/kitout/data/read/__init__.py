"""Files and hub sets to rows."""
