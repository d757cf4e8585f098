"""Tensors that could be the singular vectors, sigma or raw weight of a handwritten spectral norm.

A layer that lacks its weight holds, under a name derived from it, what it is computed from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...running import is_dense
from ..names import is_named_as_state


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters that can be seen as a matrix."""
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not is_lazy(parameter)
        and is_dense(parameter)
        and parameter.ndim >= 2
        and parameter.numel() > 0
        and (parameter.is_floating_point() or parameter.is_complex())
    }


def small_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the module's own buffers, tensors in attributes and parameters without grad."""
    yield from ((n, t) for n, t in module._buffers.items() if t is not None)
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad and not is_lazy(parameter):
            yield name, parameter
    yield from ((n, t) for n, t in module.__dict__.items() if isinstance(t, Tensor))


def fits(name: str, tensor: Tensor, weight: Tensor) -> bool:
    """Whether ``tensor`` could hold singular vectors of ``weight`` as a matrix of any reading."""
    if tensor is weight or not is_dense(tensor):
        return False
    if tensor.dtype.is_complex != weight.dtype.is_complex:
        return False
    if not (tensor.is_floating_point() or tensor.is_complex()) or "bias" in name:
        return False
    if tensor.ndim not in (1, 2) or (tensor.ndim == 2 and min(tensor.shape) > 8):
        return False
    length = max(tensor.shape)
    sizes = {rows for rows in weight.shape}
    sizes |= {weight.numel() // rows for rows in weight.shape}
    return length in sizes and (length > 1 or is_named_as_state(name))


def proportion(raw: Tensor, value: Tensor) -> float | None:
    """Return ``c`` where ``raw = c * value`` up to rounding, such as sigma; None if there is none.

    Args:
        raw: any floating or complex dtype, not on the meta device.
        value: shape and dtype of ``raw``.
    """
    wide = torch.complex128 if raw.is_complex() else torch.float64
    a, b = raw.detach().to(wide).flatten(), value.detach().to(wide).flatten()
    norm = torch.vdot(b, b)
    factor = torch.vdot(b, a) / norm
    ratio = float(factor.real if factor.is_complex() else factor)
    if not (0 < abs(ratio) < float("inf")):  # also false for NaN
        return None
    # Division by sigma and a cast of sigma round by a few units in the last place.
    tolerance = 16 * torch.finfo(value.dtype).eps * float(b.abs().max())
    smallest = 4 * torch.finfo(value.dtype).tiny
    difference = float((a / factor - b).abs().max())
    return ratio if difference <= tolerance + smallest else None


def is_multiple(weight: Tensor, value: Tensor) -> bool:
    """Whether ``value`` is ``weight`` times a number, up to rounding; on the meta device it is."""
    if value.dtype != weight.dtype or value.shape != weight.shape:
        return False
    return weight.is_meta or proportion(weight, value) is not None


def is_rescaled(weight: Tensor, value: Tensor) -> bool:
    """Whether ``value`` is ``weight`` times a number, or times one for each row, or each column.

    The rows of a convolution are its output channels, the columns its input channels.
    """
    if is_multiple(weight, value):
        return True
    if value.dtype != weight.dtype or value.shape != weight.shape or weight.ndim < 2:
        return False
    return any(_has_factors(weight.movedim(dim, 0), value.movedim(dim, 0)) for dim in (0, 1))


def _has_factors(weight: Tensor, value: Tensor) -> bool:
    wide = torch.complex128 if weight.is_complex() else torch.float64
    a, b = weight.detach().to(wide).flatten(1), value.detach().to(wide).flatten(1)
    if a.shape[1] < 2:  # any two numbers are in proportion
        return False
    is_zero = (a.abs().amax(1) == 0) & (b.abs().amax(1) == 0)
    factors = ((a.conj() * b).sum(1) / (a.abs() ** 2).sum(1)).masked_fill(is_zero, 1)
    if not (factors.abs().isfinite() & (factors.abs() > 0)).all():
        return False
    tolerance = 16 * torch.finfo(value.dtype).eps * b.abs().amax(1)
    return bool(((a * factors[:, None] - b).abs().amax(1) <= tolerance).all())
