"""The losses of preferences and of reinforcement, pure functions of tensors: each item's own loss, never a mean."""
