"""Log-probabilities over a frozen output head in one pass, with their gradient for the hidden states; no logits kept.

The head is frozen, so both come from the same few rows of logits, which are then freed: one chunk is in memory at a
time. Liger-Kernel's fused linear cross-entropy computes its gradients in the forward in the same way. Written by hand:
torch 2.13's `linear_cross_entropy` gives the loss alone (and kitout runs on 2.6); here each label's log-probability is
an output of its own, and the entropy or whether the label is the likeliest comes from the same logits. A cross-entropy
is a weighted sum of them. It knows vectors, a matrix and labels; the caller selects the target positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of float32 logits in memory at a time
ENTROPY_BYTES = 2 * 2**20  # of them at a time in an entropy on a CPU: its two copies stay in the cache


class _ChunkedLoss(torch.autograd.Function):
    """nll [N] = -log softmax((h W^T + b) / temperature)[labels] with its gradient for h alone.

    Beside it, without gradients: the entropy [N], or whether each label is the likeliest [N].
    """

    @staticmethod
    def forward(
        ctx: Any, h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, wants_entropy: bool,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_grad = ctx.needs_input_grad[0]
        grad_Nd = torch.empty_like(h_Nd) if needs_grad else h_Nd.new_empty(0)
        dtype = torch.promote_types(h_Nd.dtype, torch.float32)
        nll_N = torch.empty(len(h_Nd), dtype=dtype, device=h_Nd.device)
        beside_N = torch.empty(len(h_Nd), dtype=dtype if wants_entropy else torch.bool, device=h_Nd.device)
        rows = max(1, CHUNK_BYTES // (4 * w_Vd.shape[0]))
        for start in range(0, len(h_Nd), rows):
            chunk = slice(start, start + rows)
            labels = labels_N[chunk, None]
            logits = F.linear(h_Nd[chunk], w_Vd, b_V).to(dtype)  # rounded to the head's dtype as the model's own are
            if temperature != 1.0:
                logits = logits / temperature
            if not wants_entropy:
                beside_N[chunk] = logits.argmax(1) == labels_N[chunk]
            largest = logits.amax(1, keepdim=True)
            of_labels = logits.gather(1, labels) - largest
            logits.sub_(largest)
            if wants_entropy:
                total, beside_N[chunk] = _exp_and_entropy(logits)
            else:
                total = logits.exp_().sum(1, keepdim=True)
            nll_N[chunk] = (total.log() - of_labels).squeeze(1)
            if needs_grad:
                logits.div_(total).scatter_add_(1, labels, torch.full_like(total, -1.0))
                if temperature != 1.0:
                    logits.div_(temperature)
                grad_Nd[chunk] = logits.to(w_Vd.dtype) @ w_Vd
        ctx.save_for_backward(grad_Nd)
        ctx.mark_non_differentiable(beside_N)
        return nll_N, beside_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Any) -> Any:
        """The incoming gradient comes in only here, in float32: times 1/tokens a half-precision one may round to 0."""
        (grad_Nd,) = ctx.saved_tensors
        return (grad_Nd * grad_N[:, None]).to(grad_Nd.dtype), None, None, None, None, None


def chunked_cross_entropy(
    h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i weights_i * -log softmax(h_i W^T + b)[labels_i] with its gradient for h alone; nll [N]; is_correct [N]."""
    nll_N, is_correct_N = _ChunkedLoss.apply(h_Nd, w_Vd, b_V, labels_N, False, 1.0)
    return (weights_N.float() * nll_N).sum(), nll_N.detach(), is_correct_N


def chunked_log_probs(
    h_Nd: Tensor, w_Vd: Tensor, b_V: Tensor | None, labels_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax((h_i W^T + b) / temperature)[labels_i] [N] with its gradient for h alone; the entropy in nats [N].

    Both in float32, or float64 where h is, and so are the logits when they are divided by the temperature.
    """
    nll_N, entropy_N = _ChunkedLoss.apply(h_Nd, w_Vd, b_V, labels_N, True, temperature)
    return -nll_N, entropy_N


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is too coarse for a softmax."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy_terms(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three of `chunked_cross_entropy`, for a head that is trained or has more of the model after it."""
    nll_N = F.cross_entropy(at_least_float32(logits_NV), labels_N, reduction="none")
    return (weights_N.float() * nll_N).sum(), nll_N.detach(), logits_NV.detach().argmax(1) == labels_N


def log_prob_terms(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The two of `chunked_log_probs`, for such a head."""
    nll_N = F.cross_entropy(at_least_float32(logits_NV), labels_N, reduction="none")
    entropy_N = torch.empty_like(nll_N)
    with torch.no_grad():
        rows = max(1, CHUNK_BYTES // (4 * logits_NV.shape[1]))
        for start in range(0, len(nll_N), rows):
            logits = at_least_float32(logits_NV[start : start + rows].detach())
            _, entropy_N[start : start + rows] = _exp_and_entropy(logits - logits.amax(1, keepdim=True))
    return -nll_N, entropy_N


def _exp_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] with a maximum of 0 become their exponentials in place; their sums [N, 1] and the entropy [N].

    H = log sum_v exp(x_v) - sum_v x_v exp(x_v) / sum_v exp(x_v). A logit of -inf has probability 0 and adds nothing.
    """
    num_bytes = ENTROPY_BYTES if logits.device.type == "cpu" else CHUNK_BYTES // 4
    rows = max(1, num_bytes // (4 * logits.shape[1]))
    products = logits.new_empty(len(logits))
    for start in range(0, len(logits), rows):
        x = logits[start : start + rows].clamp_(min=torch.finfo(logits.dtype).min)
        exponentials = x.exp()
        products[start : start + rows] = torch.linalg.vecdot(exponentials, x)
        x.copy_(exponentials)
    total = logits.sum(1, keepdim=True)
    return total, (total.log() - products[:, None] / total).squeeze(1)
