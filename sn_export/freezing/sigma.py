"""Sigma as the stored vectors estimate it, and exactly; no power iteration moves the vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_SMALL = 2**31  # multiplications
_BLOCK = 2**20  # elements
_EVERY, _ITERATIONS = 10, 300
_RESIDUAL = 1e-6
_FEW, _MOST = 4, 8  # power iterations; each reads the matrix twice
_NEAR = 4 / 3


def stored_sigma(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """Return ``u^H W v``, the spectral norm that the stored singular vectors estimate.

    The estimate of Miyato et al., "Spectral Normalization for Generative Adversarial
    Networks" (arXiv:1802.05957), as `torch.nn.utils.spectral_norm` computes it.

    Args:
        matrix: the weight as a matrix of shape ``(h, w)``, any floating or complex dtype.
        u: left singular vector, shape ``(h,)``.
        v: right singular vector, shape ``(w,)``.

    Returns:
        The estimate (its real part for complex weights); NaN where there are no values
        to read, as on the meta device.
    """
    if any(t.device.type == "meta" for t in (matrix, u, v)):
        return math.nan
    sigma = torch.vdot(u.detach(), torch.mv(matrix.detach(), v.detach()))
    return float(sigma.real if sigma.is_complex() else sigma)


def exact_sigma(matrix: Tensor) -> float:
    """Return the largest singular value of ``matrix``.

    Of a small matrix it is the root of the largest eigenvalue of the smaller of ``W W^H`` and
    ``W^H W``, computed in float64. Squaring costs small singular values their digits, but not the
    largest one: the relative error is below 1e-12.

    The product and its eigenvalues take hours for the layers of a large network. Where they
    would take more than 2**31 multiplications (724 x 724, 512 x 5000), Lanczos iterations look
    for the singular vector instead, until it is one but for a relative 1e-6
    (`_compute_leading_vector`), and ``||W v||`` is computed in float64. It never exceeds the true
    value but for rounding. The error is that of the vector squared, below 1e-9 for the weights of
    networks; where the largest values differ by less than 1e-5, it may be their difference. What is
    in memory beside the matrix is a block of rows and the vectors of the iterations.

    Args:
        matrix: shape ``(h, w)``, any floating or complex dtype, on any device but meta.

    Returns:
        The spectral norm; NaN where an element is not finite.
    """
    tall = matrix.detach().cpu()
    scale = _find_largest_element(tall)
    if not scale or not math.isfinite(scale):
        return math.nan if scale else 0.0
    if tall.shape[0] < tall.shape[1]:
        tall = tall.mH
    wide = torch.complex128 if tall.is_complex() else torch.float64
    if _gram_cost(tuple(tall.shape)) <= _SMALL:
        gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=wide)
        for block in _iter_blocks(tall, wide):
            scaled = block / scale  # squares of float64 would overflow or vanish
            gram += scaled.mH @ scaled
        return scale * math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))
    v = _compute_leading_vector(tall, scale).to(wide)
    v /= v.norm() * scale
    lengths = [float((block @ v).norm()) for block in _iter_blocks(tall, wide)]
    return scale * math.hypot(*lengths)


def _find_largest_element(matrix: Tensor) -> float:
    """Return the largest absolute value of a real number in ``matrix``, without a copy of it."""
    if not matrix.numel():
        return 0.0
    values = torch.view_as_real(matrix.resolve_conj()) if matrix.is_complex() else matrix
    if values.dtype.itemsize == 1:  # float8 cannot be compared
        values = values.float()
    least, largest = torch.aminmax(values)
    return max(-float(least), float(largest)) if least <= largest else math.nan


def _iter_blocks(tall: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a few rows at a time, as many as the caches of a processor hold."""
    for rows in torch.split(tall, max(_BLOCK // tall.shape[1], 1)):
        yield rows.to(dtype)


def _compute_leading_vector(tall: Tensor, scale: float) -> Tensor:
    """Return the right singular vector of the largest singular value, by Lanczos' method.

    From a random start it builds an orthonormal basis in which ``W^H W`` is tridiagonal, and
    takes the leading eigenvector there (Golub and Van Loan, Matrix Computations, chapter 10).
    Each vector is made orthogonal to all before it, twice, so that rounding yields no copies.

    Args:
        tall: shape ``(h, w)`` with ``w <= h``.
        scale: its largest element, by which it is divided.

    Returns:
        Shape ``(w,)``. Its residual is below 1e-6 of the eigenvalue, unless 300 iterations do not
        get there; 40 to 100 suffice for the weights of networks, which are near to random.
    """
    is_wide = tall.dtype in (torch.float64, torch.complex128) or not 1e-12 < scale < 1e12
    dtype = torch.float64 if is_wide else torch.float32
    dtype = dtype.to_complex() if tall.is_complex() else dtype
    draws = torch.Generator().manual_seed(0)
    basis = torch.empty(_ITERATIONS, tall.shape[1], dtype=dtype)
    following = torch.randn(tall.shape[1], generator=draws).to(dtype)
    projected = torch.zeros(_ITERATIONS, _ITERATIONS, dtype=torch.float64)
    length = float(following.norm())
    for done in range(1, _ITERATIONS + 1):
        basis[done - 1] = following / length
        known, following = basis[:done], torch.zeros_like(following)
        for block in _iter_blocks(tall, dtype):
            following += block.mH @ (block @ (known[-1] / scale))
        following /= scale
        projected[done - 1, done - 1] = torch.vdot(known[-1], following).real
        for _ in range(2):
            following -= known.mT @ (known.conj() @ following)
        length = float(following.norm())
        # What follows is nothing but rounding where the basis is all that the start leads to.
        is_all = length <= 4 * torch.finfo(dtype).eps * float(projected.max())
        if is_all or done % _EVERY == 0:
            values, vectors = torch.linalg.eigh(projected[:done, :done])
            residual = length * abs(float(vectors[-1, -1]))
            if is_all or residual <= _RESIDUAL * float(values[-1]) or done == _ITERATIONS:
                break
        projected[done, done - 1] = projected[done - 1, done] = length
    return torch.mv(known.mT, vectors[:, -1].to(dtype))


def least_sigma(matrix: Tensor, known: float) -> float:
    """Return a bound that the largest singular value of ``matrix`` is not below, in little time.

    It is the estimate of a few power iterations from a start of their own: for the weights of
    networks, which are near to random, 5 % to 20 % below the true value.

    Args:
        matrix: shape ``(h, w)``, any floating or complex dtype, on any device but meta.
        known: another estimate. The iterations end after four where theirs is not far above it:
            the other four add less to it than that.

    Returns:
        The bound, but for rounding; NaN where an element is not finite.
    """
    wide = matrix.detach().to(torch.complex64 if matrix.is_complex() else torch.float32)
    draws = torch.Generator().manual_seed(0)
    v = torch.randn(wide.shape[1], generator=draws).to(wide)
    for done in range(_MOST):
        product = torch.mv(wide, v / v.norm())
        if done >= _FEW and (bound := float(product.norm())) <= _NEAR * known:
            return bound
        v = torch.mv(wide.mH, product)
    return float(torch.mv(wide, v / v.norm()).norm()) if v.any() else 0.0


def exact_sigma_cost(shape: tuple[int, ...]) -> float:
    """Return about how many multiplications `exact_sigma` takes for a matrix of this shape.

    Lanczos iterations multiply less and wait for the memory: 80 of them, each with two products
    by a vector, take the time of 600 multiplications for each element.
    """
    gram = _gram_cost(shape)
    return gram if gram <= _SMALL else 600.0 * math.prod(shape)


def _gram_cost(shape: tuple[int, ...]) -> float:
    small, large = sorted(shape)
    return float(small * small * large + 4 * small**3)
