"""What is kept: adapters in files, and files of others.

`store` writes and reads kitout's own folders, `peft` those of Hugging Face PEFT; both go through `rebuild`, which
builds an adapter from named tensors, and `tensors`, which reads safetensors with suspicion. No pickle anywhere.
"""
