"""The heads of an adapter: what the checkpoint does not hold, and the classifier, trained and saved with it.

A newly initialized classifier is linear, or linear after a BatchNorm without gain and shift, whose statistics are
updated in training mode. It knows where heads are and how they are initialized, no data and no loss.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import nn

from kitout.errors import ConfigError
from kitout.kit import Kit


def copy_heads(kit: Kit, new_heads: Collection[str], is_language_model: bool) -> dict[str, nn.Module]:
    """Copies in float32, by path, of what the checkpoint does not hold and of the classifier.

    is_language_model: it has no classifier, and nothing may be missing.
    """
    if is_language_model:
        if new_heads:
            raise ConfigError(
                f"the checkpoint does not hold {sorted(new_heads)[:4]}: it is not a language model that can be adapted"
            )
        return {}
    paths = {*new_heads, *(site.path for site in kit.survey.sites if site.role == "head")}
    return {path: copy.deepcopy(module).float() for path, module in kit.base.named_modules() if path in paths}


def build_heads(
    heads: Mapping[str, nn.Module], new_heads: Collection[str], num_classes: int, seed: int, kind: str = "linear"
) -> dict[str, nn.Module]:
    """One adapter's copies: the checkpoint's own values where it has them for as many classes, else new ones.

    The last head has as many outputs as there are classes. kind: of the last head, "linear" or "batchnorm".
    """
    copies = {path: copy.deepcopy(module) for path, module in heads.items()}
    last = next(reversed(copies), None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs, for good
        for path, head in copies.items():
            if path == last and kind == "batchnorm":
                copies[path] = batchnorm_head(_in_features(path, head), num_classes)
                continue
            outputs = num_classes if path == last else getattr(head, "out_features", 0)
            if isinstance(head, nn.Linear) and (path in new_heads or outputs != head.out_features):
                copies[path] = linear_head(head.in_features, outputs, head.bias is not None)
    return copies


def linear_head(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Initialized as transformers initializes its classifiers: N(0, 0.02), bias 0."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def batchnorm_head(in_features: int, out_features: int) -> nn.Sequential:
    """BatchNorm1d(affine=False, eps=1e-6), then a linear from a truncated N(0, 0.01).

    AdaptFormer's head (code ShoufaChen/AdaptFormer, main_image.py), after MAE's and MoCo v3's probes.
    """
    layer = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.BatchNorm1d(in_features, affine=False, eps=1e-6), layer)


def _in_features(path: str, head: nn.Module) -> int:
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"train.head=batchnorm takes the place of a linear classifier, and this model's, {path}, is a "
            f"{type(head).__name__}: choose train.head=linear"
        )
    return head.in_features
