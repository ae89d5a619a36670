"""Files and hub data sets to rows."""
