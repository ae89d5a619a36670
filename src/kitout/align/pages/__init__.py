"""What a stage adds to the report, the card and the terminal."""
