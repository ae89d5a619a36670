"""The scalar head of a new reward or value adapter: a linear in the place of the output head.

An adapter holds it among its heads, `heads={head_path(kit): scalar_head(kit, seed)}`, so it is saved and loaded as any
other head. The scalars that it gives are read by `kitout.train.objectives.scalar_output`, which predictions use as
well. It knows no losses, no data and no roles. Initial values: Huang et al. 2024, arXiv 2403.17031.
"""

from __future__ import annotations

import torch
from torch import nn

from kitout.kit import Kit
from kitout.train.objectives.scalar_output import head_path as head_path  # for those that import them from here
from kitout.train.objectives.scalar_output import head_width as head_width
from kitout.train.objectives.scalar_output import how_to_add as how_to_add
from kitout.train.objectives.scalar_output import last_scalars as last_scalars
from kitout.train.objectives.scalar_output import last_tokens as last_tokens
from kitout.train.objectives.scalar_output import scalars as scalars


def scalar_head(kit: Kit, seed: int) -> nn.Linear:
    """A new head, d -> 1: weights from N(0, 1 / sqrt(d + 1)) as standard deviation, bias 0.

    For `kit.add(name, method, heads={head_path(kit): scalar_head(kit, seed)})`. Of the dtype that an adapter's trained
    values have: float32 over a base of half precision. Drawn on CPU, so that a seed means the same values everywhere.
    """
    d = kit.base.get_submodule(head_path(kit)).in_features
    assert isinstance(d, int)
    dtype = torch.promote_types(kit.dtype, torch.float32)
    head: nn.Linear = nn.utils.skip_init(nn.Linear, d, 1, dtype=dtype)  # draws nothing from the global generator
    with torch.no_grad():
        head.weight.normal_(0.0, (d + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head
