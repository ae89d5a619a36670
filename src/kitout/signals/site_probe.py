"""A probe at a site: it changes no value, and sees the input in the forward and the output's gradient in the backward.

It is an adapter like any other, so it acts where a LoRA would. With B = 0 the gradient of a LoRA's B is G A^T for the
gradient G of the weight, and E|G A^T|^2 = |G|^2 for A ~ N(0, 1/r): that product is all that is kept of G. The rows of A
are made orthogonal, which leaves the mean and takes deviation away. It knows one site, and neither losses nor what is
made of what is seen.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.weights import FrozenModule
from kitout.delta import Delta
from kitout.method import Method
from kitout.signals.input_svd import InputSVD


class Recorder(Protocol):
    """What a probe reports to."""

    def on_input(self, x: Tensor) -> Tensor:
        """x: the input of the site [..., d_in]. Returns what the backward needs of it."""
        ...

    def on_gradient(self, g: Tensor, kept: Tensor) -> None:
        """g: the gradient of the site's output [..., d_out]. kept: what `on_input` returned for this call."""
        ...


class SiteProbe(Method):
    """A probe at every selected site. It has no effect."""

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return ProbeDelta()

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return len(sites)


class ProbeDelta(Delta):
    """y' = y. The anchor is what the gradient is asked for: it makes the backward pass come by."""

    recorder: Recorder | None

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.recorder = None

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        if self.recorder is None or not torch.is_grad_enabled():
            return y
        seen: Tensor = _Tap.apply(y, self.anchor, x.detach(), self.recorder)
        return seen


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, recorder: Recorder) -> Tensor:
        ctx.recorder = recorder
        ctx.save_for_backward(recorder.on_input(x), anchor)
        return y.clone()  # a view could not be overwritten by the model

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, anchor = ctx.saved_tensors
        ctx.recorder.on_gradient(g, kept)
        return g, torch.zeros_like(anchor), None, None


class SketchRecorder:
    """G A^T over all batches, the same by row for the Fisher mass, and the directions of the inputs."""

    def __init__(self, site: Site, rank: int, seed: int, inputs: InputRecorder | None) -> None:
        self.site, self.inputs = site, inputs
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{site.path}".encode()))
        self.a = _random_rows(rank, site.d_in, generator) * math.sqrt(site.d_in / rank)
        self.product: Tensor | None = None
        self.fisher_mass = 0.0
        self.svd: InputSVD | None = None
        self.batch_size = 0  # of the batch in progress; 0: unknown
        self._num_open_calls = 0
        self._by_row: list[Tensor] = []

    def on_input(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            self.inputs.update(self, x)
        x = _at_least_float32(x)
        self.a = self.a.to(x)
        self._num_open_calls += 1
        return x @ self.a.T

    def on_gradient(self, g: Tensor, kept: Tensor) -> None:
        rows = self._num_rows(g)
        g, kept = (value.reshape(rows, -1, value.shape[-1]) for value in (g.to(kept.dtype), kept))
        by_row = g.transpose(1, 2) @ kept  # [rows, d_out, rank]
        total = by_row.sum(0)
        self.product = total if self.product is None else self.product + total
        self._num_open_calls -= 1
        if self._num_open_calls or self._by_row:  # called several times in one forward: a row's gradient is their sum
            self._by_row.append(by_row)
        if not self._num_open_calls:
            self._count_rows(self._by_row or [by_row])

    def _num_rows(self, value: Tensor) -> int:
        """Rows of the batch that lie one after the other in a value; 1 where they are mixed."""
        if self.site.batch_relation == "batch":
            return value.shape[0]
        divides = self.batch_size and value.shape[0] % self.batch_size == 0
        return self.batch_size if self.site.batch_relation == "multiple" and divides else 1

    def _count_rows(self, calls: list[Tensor]) -> None:
        total = calls[0]
        for call in calls[1:]:
            total = total + call if call.shape == total.shape else total.sum(0, True) + call.sum(0, True)
        self.fisher_mass += float(total.square().sum())
        self._by_row = []

    def finish_batch(self) -> None:
        """The calls whose outputs nothing depends on have no backward."""
        if self._by_row:
            self._count_rows(self._by_row)
        self._num_open_calls = 0

    def gradient_energy(self) -> float:
        """|G|^2, up to a relative standard deviation of at most sqrt(2 / rank)."""
        return 0.0 if self.product is None else float(self.product.double().square().sum())


def _random_rows(num: int, width: int, generator: torch.Generator) -> Tensor:
    """[num, width]: random rows of length 1, orthogonal to each other within every `width` of them."""
    blocks = []
    for start in range(0, num, width):
        rows = torch.randn(min(width, num - start), width, generator=generator)
        q, r = torch.linalg.qr(rows.T)
        blocks.append((q * r.diagonal().sign()).T)
    return torch.cat(blocks)


class InputRecorder:
    """The inputs of all sites at trained positions. Sites that read one tensor (q, k and v) share its SVD."""

    def __init__(self, num_directions: int) -> None:
        self.num_directions = num_directions
        self.masks: Sequence[Tensor] = ()
        """Which positions are trained, [B, T] each; a site takes the first one of its input's shape."""
        self._last: tuple[Tensor, int, InputSVD] | None = None
        self._owners: dict[InputSVD, SketchRecorder] = {}

    def begin_batch(self, masks: Sequence[Tensor]) -> None:
        self.masks, self._last = masks, None

    def update(self, recorder: SketchRecorder, x: Tensor) -> None:
        shared = None
        if self._last is not None:
            last, version, svd = self._last
            is_same = (last.data_ptr(), last.shape, last.stride()) == (x.data_ptr(), x.shape, x.stride())
            shared = svd if is_same and version == x._version else None
        if recorder.svd is None:
            recorder.svd = shared or InputSVD(self.num_directions)
            self._owners.setdefault(recorder.svd, recorder)
        if recorder.svd is shared:
            return
        if self._owners[recorder.svd] is not recorder:  # it read the same tensor as another site, and no longer does
            recorder.svd = copy.deepcopy(recorder.svd)
            self._owners[recorder.svd] = recorder
        recorder.svd.update(_at_least_float32(self._trained(x)))
        self._last = (x, x._version, recorder.svd)

    def _trained(self, x: Tensor) -> Tensor:
        """[n, d_in]: the rows at trained positions; all where no mask has the shape of the input."""
        for mask in self.masks:
            if x.shape[:-1] == mask.shape:
                return x[mask]
            if x.ndim == 2 and len(x) == mask.numel():
                return x[mask.flatten()]
        return x.reshape(-1, x.shape[-1])


class GradientRecorder:
    """The whole gradient of the weight over all batches."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.gradient: Tensor | None = None

    def on_input(self, x: Tensor) -> Tensor:
        return x

    def on_gradient(self, g: Tensor, kept: Tensor) -> None:
        g, kept = (_at_least_float32(value.reshape(-1, value.shape[-1])) for value in (g, kept))
        product = g.T @ kept
        self.gradient = product if self.gradient is None else self.gradient.add_(product)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
