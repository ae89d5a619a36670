"""Classes of transformers, as far as it is loaded: nothing is an instance of a class that nobody has imported yet.

So kitout starts without transformers, and a model that has nothing to do with it is found, probed and adapted without
it. It knows two classes by name, and no model.
"""

from __future__ import annotations

import sys

from torch import nn

ModuleClass = type[nn.Module] | tuple[()]


def pretrained_model() -> ModuleClass:
    """PreTrainedModel; () before transformers is loaded, which `isinstance` takes for no class at all."""
    return _loaded("transformers.modeling_utils", "PreTrainedModel")


def transposed_linear() -> ModuleClass:
    """Its Conv1D, a linear whose weight is stored [in, out]."""
    return _loaded("transformers.pytorch_utils", "Conv1D")


def _loaded(module: str, name: str) -> ModuleClass:
    # A module that another thread is importing right now has no instances either.
    cls: ModuleClass = getattr(sys.modules.get(module), name, ())
    return cls
