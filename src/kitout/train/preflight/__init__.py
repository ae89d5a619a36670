"""What is known before the first step."""
