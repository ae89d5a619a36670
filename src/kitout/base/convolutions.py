"""A convolution's kernel as a matrix, and what follows from its form: grouped, dilated, strided, transposed, 1 to 3-D.

The matrix is [d_out, d_in / groups * kernel], its rows in the order of the output channels, also for a transposed
convolution, which stores its kernel [d_in, d_out / groups, *kernel]. It knows nothing of adapters or of sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Transposed = nn.modules.conv._ConvTransposeNd
CONVOLVE: Any = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


def kernel_to_matrix(module: nn.modules.conv._ConvNd, kernel: Tensor) -> Tensor:
    """[d_out, d_in / groups * kernel]; a view, unless the convolution is transposed and grouped."""
    if isinstance(module, Transposed):
        kernel = kernel.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return kernel.flatten(1)


def matrix_to_kernel(module: nn.modules.conv._ConvNd, matrix: Tensor) -> Tensor:
    """The reverse, for a matrix with any number of rows that the groups divide."""
    kernel = matrix.unflatten(1, (-1, *module.kernel_size))
    if isinstance(module, Transposed):
        kernel = kernel.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return kernel


def matrix_width(module: nn.modules.conv._ConvNd) -> int:
    return module.in_channels // module.groups * prod(module.kernel_size)


def by_channel(module: nn.modules.conv._ConvNd, matrix: Tensor) -> Tensor:
    """The matrix as [groups, d_out / groups, d_in / groups, kernel positions]."""
    rows = matrix.unflatten(0, (module.groups, -1))
    return rows.unflatten(2, (module.in_channels // module.groups, -1))


def scale_channels(module: nn.modules.conv._ConvNd, matrix: Tensor, scale: Tensor) -> Tensor:
    """The matrix for which every input channel is multiplied by a factor of its own."""
    return (by_channel(module, matrix) * scale.unflatten(0, (module.groups, 1, -1, 1))).view_as(matrix)


def convolve(module: nn.modules.conv._ConvNd, x: Tensor, matrix: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The module's own map with another kernel, given as a matrix, and no bias -> channels last.

    size: of the output, where a transposed convolution was called for one that is not its default.
    """
    function = CONVOLVE[len(module.kernel_size), isinstance(module, Transposed)]
    kernel = matrix_to_kernel(module, matrix)
    y: Tensor
    if isinstance(module, Transposed):
        padding = module.output_padding if size is None else _output_padding(module, x.shape[2:], size)
        y = function(x, kernel, None, module.stride, module.padding, padding, module.groups, module.dilation)
    elif module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        y = function(x, kernel, None, module.stride, 0, module.dilation, module.groups)
    else:
        y = function(x, kernel, None, module.stride, module.padding, module.dilation, module.groups)
    return y.movedim(1, -1)


def _output_padding(module: Any, before: Sequence[int], after: Sequence[int]) -> list[int]:
    """What a transposed convolution adds at one end for an output of this size."""
    sizes = zip(before, after, module.stride, module.padding, module.dilation, module.kernel_size, strict=True)
    return [out - ((n - 1) * stride - 2 * pad + dilation * (k - 1) + 1) for n, out, stride, pad, dilation, k in sizes]


def sees_every_channel_everywhere(module: nn.modules.conv._ConvNd) -> bool:
    """True where all kernel positions lie on the input at every output position, so that a shift of it is a bias."""
    if isinstance(module, Transposed):
        extra = (*module.padding, *module.output_padding)
        return prod(module.kernel_size) == prod(module.stride) == 1 and not any(extra)
    return module.padding_mode != "zeros" or not any(module._reversed_padding_repeated_twice)


def smallest_input(module: nn.modules.conv._ConvNd) -> list[int]:
    """A size of input that is enough for several outputs."""
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return [dilation * (k - 1) + 1 + 3 * stride + 2 * k for k, stride, dilation in sizes]
