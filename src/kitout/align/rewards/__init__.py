"""What answers are worth: reward adapters, the user's functions, reasoning-gym, weighted sums."""
