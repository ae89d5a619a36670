"""Cross-entropy over a frozen output head in one pass: the loss and its gradient for the hidden states, no logits kept.

The head does not learn, so both come out of the same few rows of logits, which are then forgotten: what is held besides
the weights is one chunk. Liger-Kernel's fused linear cross-entropy makes its gradients in the forward in the same way.
Kept by hand: torch 2.13's `linear_cross_entropy` gives the loss alone (and our floor is 2.6); here each token's loss
and hit come from the same logits, where log-probabilities and entropy for RLHF will come from too.
It knows vectors, a matrix and labels; which positions are learnt is the caller's choice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of float32 logits held at a time


class _ChunkedCrossEntropy(torch.autograd.Function):
    """total = sum_i weight_i * nll_i; also nll [N] and whether each label was the likeliest [N], without gradients."""

    @staticmethod
    def forward(
        ctx: Any, h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        grad_Nd = torch.empty_like(h_Nd) if wanted else h_Nd.new_empty(0)
        form = torch.promote_types(h_Nd.dtype, torch.float32)
        nll_N = torch.empty(len(h_Nd), dtype=form, device=h_Nd.device)
        right_N = torch.empty(len(h_Nd), dtype=torch.bool, device=h_Nd.device)
        rows = max(1, CHUNK_BYTES // (4 * w_Vd.shape[0]))
        for at in range(0, len(h_Nd), rows):
            part = slice(at, at + rows)
            labels = labels_N[part, None]
            logits = F.linear(h_Nd[part], w_Vd, b_V).to(form)  # rounded to the head's dtype as the model's own are
            right_N[part] = logits.argmax(1) == labels_N[part]
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, labels) - largest
            logits.sub_(largest).exp_()
            total = logits.sum(1, keepdim=True)
            nll_N[part] = (total.log() - chosen).squeeze(1)
            if wanted:
                logits.div_(total).scatter_add_(1, labels, torch.full_like(total, -1.0))
                grad_Nd[part] = logits.to(w_Vd.dtype) @ w_Vd
        ctx.save_for_backward(grad_Nd, weights_N)
        ctx.mark_non_differentiable(nll_N, right_N)
        return (weights_N * nll_N).sum(), nll_N, right_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        """Weights come in here, in fp32: times 1/tokens a half-precision gradient would be rounded to nothing."""
        grad_Nd, weights_N = ctx.saved_tensors
        return (grad_Nd * (weights_N.to(grad.dtype) * grad)[:, None]).to(grad_Nd.dtype), None, None, None, None


def chunked_cross_entropy(
    h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i weights_i * -log softmax(h_i W^T + b)[labels_i] with its gradient for h alone; nll [N]; right [N]."""
    found: tuple[Tensor, Tensor, Tensor] = _ChunkedCrossEntropy.apply(h_Nd, w_Vd, b_V, labels_N, weights_N.float())
    return found


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is too coarse for a softmax."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy_terms(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same three from logits, for a head that learns or a model that does more after it."""
    nll_N = F.cross_entropy(at_least_float32(logits_NV), labels_N, reduction="none")
    return (weights_N.float() * nll_N).sum(), nll_N.detach(), logits_NV.detach().argmax(1) == labels_N
