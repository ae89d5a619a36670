"""A change as LoRA: its factors cut to a rank, the words for its sites and ranks, what training made of one."""
