"""How tensors lie in memory: dense or in another layout, and whether a model is a large one.

A large model is treated in ways that need less memory, and more time or room on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LARGE = 2**29  # bytes of weights, past which a model is a large one

_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_BY_COLUMN = (torch.sparse_csc, torch.sparse_bsc)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie one by one in memory, as a file can hold them."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return dense tensors that hold, together, every value of ``tensor``.

    A dense tensor is its only part; a sparse one gives its indices and its values.
    """
    if tensor.is_nested:
        return [*tensor.unbind()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _BY_ROW:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in _BY_COLUMN:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor] if is_dense(tensor) else [tensor.to_dense()]


def as_real_pairs(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a file has it: real and imaginary parts in a last dimension of 2.

    As `torch.view_as_real`; any other tensor is returned as it is::

        as_real_pairs(torch.zeros(4, 8, dtype=torch.complex64))  # float32, shape (4, 8, 2)
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_large(size: int) -> bool:
    """Whether ``size`` bytes of weights are those of a large model."""
    return size > LARGE


def are_large(tensors: Iterable[Tensor]) -> bool:
    """Whether ``tensors`` take, together, as many bytes as those of a large model."""
    return is_large(sum(part.nbytes for tensor in tensors for part in dense_parts(tensor)))
