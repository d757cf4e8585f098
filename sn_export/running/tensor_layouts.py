"""How tensors lie in memory: dense or in another layout, and together large or not.

Large is where memory counts for more than the time, or the room on disk, that saves it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LARGE = 2**29  # bytes

_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_BY_COLUMN = (torch.sparse_csc, torch.sparse_bsc)


def is_dense(tensor: Tensor) -> bool:
    """Whether a file can hold it as it is."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return dense tensors that tell, together, every value of ``tensor``."""
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
    """Whether so many bytes are."""
    return size > LARGE


def are_large(tensors: Iterable[Tensor]) -> bool:
    """Whether ``tensors`` are, together."""
    return is_large(sum(part.nbytes for tensor in tensors for part in dense_parts(tensor)))
