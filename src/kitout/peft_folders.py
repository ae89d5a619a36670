"""Adapters of Hugging Face PEFT, as functions on a kit: `kitout.load_peft` and `kitout.save_peft`.

Reading and writing are in `kitout.files.peft`, on a kit's state; here is what users call. It knows no format.
"""

from __future__ import annotations

from os import PathLike

from kitout.files.peft import folder as peft_folder
from kitout.kit import Kit
from kitout.runtime.adapter import Adapter


def load_peft(kit: Kit, folder: str | PathLike[str], name: str) -> Adapter:
    """Adds an adapter that Hugging Face PEFT saved; FileError names every reason why a folder does not fit here."""
    return peft_folder.load_peft(kit.state, folder, name)


def save_peft(kit: Kit, name: str, folder: str | PathLike[str], *, for_vllm: bool = False) -> None:
    """Writes one adapter as a folder that Hugging Face PEFT loads; FileError where PEFT has no such adapter.

    for_vllm: also refuse what vLLM would not read (DoRA, heads, biases, methods other than LoRA).
    """
    peft_folder.save_peft(kit.state, name, folder, for_vllm=for_vllm)
