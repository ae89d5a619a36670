"""Hugging Face PEFT's files, both ways."""
