"""A digest of every value of a base, so that what is kept for one base is never taken for another.

`files.base_fingerprint` samples values, leaves heads out and forgives the last digit, as an adapter fits all such
bases; kept answers are those of one base to the bit. It knows tensors, and nothing of adapters and answers.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

CHUNK = 2**22  # numbers that are summed at a time


def digest_of_values(base: nn.Module) -> str | None:
    """Of all parameters and buffers, heads included. None where a tensor's bytes cannot be read, as some quantized."""
    try:
        tensors = {name: value for name, value in base.state_dict().items() if isinstance(value, Tensor)}
        sums = [[name, str(t.dtype), list(t.shape), *_sums(t)] for name, t in tensors.items()]
    except (RuntimeError, NotImplementedError, TypeError):  # a subclass of Tensor need not have views
        return None
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _sums(tensor: Tensor) -> list[int]:
    """Of the bytes as whole numbers: one that changes changes them, and so do two that change places."""
    if tensor.is_meta:
        raise RuntimeError("no values")
    values = tensor.detach().contiguous().reshape(-1)
    if not values.numel():
        return []
    values = values.view(torch.uint8)
    values = values.view(torch.int32) if values.numel() % 4 == 0 else values
    weights = 1 + torch.arange(min(CHUNK, values.numel()), device=values.device)
    sums = [each for chunk in values.split(CHUNK) for each in (chunk.sum(), (chunk * weights[: len(chunk)]).sum())]
    found: list[int] = torch.stack(sums).tolist()
    return found
