"""Quantized bases: what transformers' loader takes for them, and what keeps 4-bit weights trainable.

It knows models by their modules, no data and no adapter.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from kitout.errors import ConfigError
from kitout.install_hint import suggest_install

BNB_CPU_FLAG = "support_avx512bf16_for_cpu"  # on bitsandbytes' 4-bit linears


def quantization_kwargs(quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes for `model.quantization`; ConfigError where the library is not installed."""
    if quantization == "none":
        return {}
    library = "torchao" if quantization.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"model.quantization={quantization} needs {library}, which is not installed\n  {suggest_install(library)}"
        )
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


def keep_nf4_trainable(model: nn.Module) -> nn.Module:
    """Keeps 4-bit weights as bitsandbytes quantized them; to be called once, before the model runs (and is attached).

    On CPUs with AVX512-BF16 bitsandbytes repacks them in place at their first use in eval mode. The repacked weights
    have no gradient, of which it gives no sign, and their scales are rounded.
    """
    for module in model.modules():
        if getattr(module, BNB_CPU_FLAG, False):
            setattr(module, BNB_CPU_FLAG, False)
    return model


def check_nf4_layout(model: nn.Module) -> None:
    """ConfigError if a 4-bit weight was repacked for inference, where it has no gradient."""
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                f"{path}: bitsandbytes has repacked this 4-bit weight for inference, where it has no gradient: load "
                "the model again and call kitout.train.setup.quantization.keep_nf4_trainable(model) before "
                "kitout.attach(model)"
            )
