"""Adapters in files: kitout's own folders and those of Hugging Face PEFT.

`adapter_folder` writes and reads kitout's folders, `peft` those of PEFT. Both build an adapter from named tensors with
`adapter_tensors` and read safetensors with `safetensors_reader`, which trusts no file. There is no pickle.
"""
