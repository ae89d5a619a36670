"""Cross-entropy over a frozen output head in one pass: the loss and its gradient for the hidden states, no logits kept.

The head is frozen, so both come from the same few rows of logits, which are then freed: one chunk is in memory at a
time. Liger-Kernel's fused linear cross-entropy computes its gradients in the forward in the same way. Written by hand:
torch 2.13's `linear_cross_entropy` gives the loss alone (and kitout runs on 2.6); here each token's loss and whether it
is correct come from the same logits, as will log-probabilities and entropy for RLHF.
It knows vectors, a matrix and labels; the caller selects the target positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of float32 logits in memory at a time


class _ChunkedCrossEntropy(torch.autograd.Function):
    """total = sum_i weight_i * nll_i; also nll [N] and whether each label is the likeliest [N], without gradients."""

    @staticmethod
    def forward(
        ctx: Any, h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        grad_Nd = torch.empty_like(h_Nd) if needs_grad else h_Nd.new_empty(0)
        dtype = torch.promote_types(h_Nd.dtype, torch.float32)
        nll_N = torch.empty(len(h_Nd), dtype=dtype, device=h_Nd.device)
        is_correct_N = torch.empty(len(h_Nd), dtype=torch.bool, device=h_Nd.device)
        rows = max(1, CHUNK_BYTES // (4 * w_Vd.shape[0]))
        for start in range(0, len(h_Nd), rows):
            chunk = slice(start, start + rows)
            labels = labels_N[chunk, None]
            logits = F.linear(h_Nd[chunk], w_Vd, b_V).to(dtype)  # rounded to the head's dtype as the model's own are
            is_correct_N[chunk] = logits.argmax(1) == labels_N[chunk]
            largest = logits.amax(1, keepdim=True)
            of_labels = logits.gather(1, labels) - largest
            logits.sub_(largest).exp_()
            total = logits.sum(1, keepdim=True)
            nll_N[chunk] = (total.log() - of_labels).squeeze(1)
            if needs_grad:
                logits.div_(total).scatter_add_(1, labels, torch.full_like(total, -1.0))
                grad_Nd[chunk] = logits.to(w_Vd.dtype) @ w_Vd
        ctx.save_for_backward(grad_Nd, weights_N)
        ctx.mark_non_differentiable(nll_N, is_correct_N)
        return (weights_N * nll_N).sum(), nll_N, is_correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        """Multiplied by the weights only here, in float32: times 1/tokens a half-precision gradient may round to 0."""
        grad_Nd, weights_N = ctx.saved_tensors
        return (grad_Nd * (weights_N.to(grad.dtype) * grad)[:, None]).to(grad_Nd.dtype), None, None, None, None


def chunked_cross_entropy(
    h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i weights_i * -log softmax(h_i W^T + b)[labels_i] with its gradient for h alone; nll [N]; is_correct [N]."""
    terms: tuple[Tensor, Tensor, Tensor] = _ChunkedCrossEntropy.apply(h_Nd, w_Vd, b_V, labels_N, weights_N.float())
    return terms


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is too coarse for a softmax."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy_terms(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same three from logits, for a head that is trained or has more of the model after it."""
    nll_N = F.cross_entropy(at_least_float32(logits_NV), labels_N, reduction="none")
    return (weights_N.float() * nll_N).sum(), nll_N.detach(), logits_NV.detach().argmax(1) == labels_N
