"""Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

`kitout.save_peft` writes it without peft; peft itself loads it again to compare. It knows no other format.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kitout.errors import FileError
from kitout.export.formats.format import AdapterFormat
from kitout.files.peft.write_tensors import why_not_in_vllm
from kitout.kit import Kit
from kitout.peft_folders import save_peft


class PeftFormat(AdapterFormat):
    """The folder that PeftModel.from_pretrained takes."""

    name = "peft"
    package = "peft"

    def write(self, kit: Kit, adapter: str, folder: Path) -> None:
        try:
            save_peft(kit, adapter, folder)
        except FileError as error:
            raise FileError(
                f"{error}\n  use it with kitout (`kitout predict`, kitout.load), or, where the method merges, as a "
                "plain model: `kitout merge ADAPTER --out FOLDER`"
            ) from error

    def load(self, model: Any, folder: Path) -> Any:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names in transformers that peft still uses
            return PeftModel.from_pretrained(model, str(folder))

    def notes(self, kit: Kit, adapter: str, folder: Path) -> Iterator[str]:
        yield f"load it: PeftModel.from_pretrained(base, {str(folder)!r})"
        if reasons := why_not_in_vllm(kit[adapter]):
            yield f"vLLM cannot serve it: {'; '.join(reasons)}"
        else:
            yield "nothing in it keeps vLLM from serving it, where vLLM serves the base"


PEFT = PeftFormat()
