"""RLHF: preference losses, reward models and reinforcement on one frozen base."""
