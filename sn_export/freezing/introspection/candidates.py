"""What could be a spectral norm written by hand: names, tensors that fit, and a test of each.

Names and sizes only nominate a `Candidate`. `Candidate.confirm` runs the code and decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...running import is_dense
from .sandbox import compute_in_sandbox, copied_attributes

# Of the raw weight: `weight_bar` of SAGAN code, `weight_orig` of torch's hook.
RAW_SUFFIXES = ("_bar", "_orig", "_raw", "_org", "_original", "_parameter", "_param")

# Attributes with the number of power iterations of a forward in train mode.
ITERATIONS = ("power_iterations", "n_power_iterations", "num_iters", "num_itrs", "n_iter", "Ip")

_VECTOR = re.compile(r"(^|_)(u|v|us|vs|u_?hat|v_?hat|u_?vec|v_?vec|left|right|singular\w*)_?\d*$")
# Vectors, singular values or sigma, such as `sv0` and `sn_u`. A single element fits the last layer
# of any critic, so its name has to be one of these.
_STATE = re.compile(r"(^|_)(u|v|us|vs|sn|sv|svs|left|right|singular|spectral|sigma)(\d*$|_)")
# SN, but not SNN, which are spiking networks; "Spectral" alone is a Fourier layer.
_CLASS = re.compile(r"[Ss]pectral_?[Nn]orm|(^|_)SN(?=[A-MO-Z_0-9]|$)|^sn_|[a-z]SN$")
# Layers of the literature that bound their norm without vectors: SLL, AOL and their kin.
_BOUNDED = re.compile(r"[Ll]ipschitz|(^|_)(SLL|AOL|CPL|BCOP)(?=[A-Z_0-9]|$)")
# In code that computes a largest singular value, and in code that normalises vectors, as each
# power iteration does.
_SIGMA = re.compile(
    r"_*(\w+_)?(svd\w*|singular\w*|spectral_(?!norm$)\w+|sigmas?|lipschitz\w*|power_it\w*|lobpcg|eigval\w*|"
    r"matrix_norm|gram|l2_?normali[sz]e)(_\w*)?"
)
_NORMS = frozenset({"normalize", "normalise", "norm", "vector_norm", "rsqrt"})


def make_plain_name(raw: str) -> str:
    """Return the name of a weight behind that of its raw tensor.

    ::

        make_plain_name("weight_bar")  # "weight"
        make_plain_name("weight")  # "weight"
    """
    return next((raw.removesuffix(s) for s in RAW_SUFFIXES if raw.endswith(s)), raw) or raw


def is_named_as_vector(name: str) -> bool:
    """Whether ``name`` is what people call singular vectors: ``u``, ``weight_v``, ``sn_u0``."""
    return bool(_VECTOR.search(name))


def is_named_as_norm(class_name: str) -> bool:
    """Whether a class is called a spectral norm: ``SNConv2d``, ``MySpectralNorm``."""
    return bool(_CLASS.search(class_name))


def is_named_as_bounded(class_name: str) -> bool:
    """Whether a class is called after a bound of its norm: ``LipschitzLinear``, ``AOLConv2d``."""
    return bool(_BOUNDED.search(class_name))


@lru_cache(4096)
def mentions_sigma(names: frozenset[str]) -> bool:
    """Whether code that uses ``names`` computes a largest singular value, by its names."""
    return any(map(_SIGMA.fullmatch, names))


def mentions_norm(names: frozenset[str]) -> bool:
    """Whether code that uses ``names`` normalises something, a largest singular value included."""
    return not _NORMS.isdisjoint(names) or mentions_sigma(names)


def find_matrices(module: nn.Module) -> dict[str, Tensor]:
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


def iter_small_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the module's own buffers, tensors in attributes and parameters without grad."""
    yield from ((n, t) for n, t in module._buffers.items() if t is not None)
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad and not is_lazy(parameter):
            yield name, parameter
    yield from ((n, t) for n, t in module.__dict__.items() if isinstance(t, Tensor))


def fits_weight(name: str, tensor: Tensor, weight: Tensor) -> bool:
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
    sizes |= {weight.numel() // rows for rows in weight.shape if rows}
    return length in sizes and (length > 1 or bool(_STATE.search(name)))


def find_proportion(raw: Tensor, value: Tensor) -> float | None:
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
    return weight.is_meta or find_proportion(weight, value) is not None


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


@dataclass(frozen=True)
class Candidate:
    """A raw weight, and what may be its singular vectors; `confirm` decides.

    Attributes:
        tensor: name of the weight in the plain network.
        raw: name of the parameter that the optimizer trains.
        weight: that parameter.
        state: names of what could be singular vectors and sigma.
        is_certain: whether tensors named as vectors fit the matrix of a weight that the layer
            lacks. Then any tensor of its shape is accepted: the code may do more than divide.
    """

    tensor: str
    raw: str
    weight: Tensor
    state: tuple[str, ...] = ()
    is_certain: bool = False

    def confirm(
        self, run: Callable[[], Any], modules: Iterable[nn.Module], holder: object = None
    ) -> Tensor | None:
        """Return the normalised weight that the user's code gives, or None.

        Args:
            run: calls that code, which finds copies of what it may write. Whatever it raises
                means that the module is not what it looked like.
            modules: those whose code may run.
            holder: an object with attributes that it may write too, such as a hook.
        """
        try:
            with nullcontext() if holder is None else copied_attributes(holder):
                value = compute_in_sandbox(run, modules)
        except Exception:
            return None
        return value if self.accepts(value) else None

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is the raw weight, normalised.

        Each row or column may have a factor of its own where there are vectors, as heads and
        groups do that are normalised one by one; without vectors that is weight norm.
        """
        if not isinstance(value, Tensor) or value.shape != self.weight.shape:
            return False
        has_vectors = any(map(is_named_as_vector, self.state))
        compare = is_rescaled if has_vectors else is_multiple
        return self.is_certain or compare(self.weight, value)


def find_missing_weights(layer: nn.Module, operators: bool = False) -> Iterator[Candidate]:
    """Yield a candidate for each weight that ``layer`` lacks and has the raw parameter of.

    Args:
        layer: where to look.
        operators: accept vectors by their names alone, too. The vectors of a convolution as an
            operator have the sizes of its input and output.
    """
    for raw, value in layer._parameters.items():
        tensor = make_plain_name(raw)
        if value is None or is_lazy(value) or tensor in layer._parameters or tensor == raw:
            continue
        beside = {
            name: entry
            for container in (layer._parameters, layer._buffers)
            for name, entry in container.items()
            if entry is not None and name != raw and name.startswith(tensor + "_")
        }
        fitting = {name for name, entry in beside.items() if fits_weight(name, entry, value)}
        state = tuple(
            name
            for name, entry in beside.items()
            if entry.numel() == 1 or name in fitting or (operators and _is_flat(name, entry))
        )
        yield Candidate(tensor, raw, value, state, any(map(is_named_as_vector, fitting)))


def _is_flat(name: str, entry: Tensor) -> bool:
    """Whether ``entry`` is named as a vector, and is a vector or one image: no low-rank factor."""
    is_single = entry.ndim == 1 or (entry.ndim > 1 and entry.shape[0] == 1)
    return is_named_as_vector(name) and is_single and not entry.requires_grad
