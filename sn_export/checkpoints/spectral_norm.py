"""Spectral norm in a state dict: its dim, its vectors, and the weight that torch makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from ..errors import CheckpointError
from ..running import SpectralNormLink
from ..text import dtype_name, format_count, quote_names
from .lazy_tensors import Entry, Spec, aligned, is_finite, require_finite, spec_of
from .reparametrizations import Reparametrization

# After a training step u = normalize(W v) or v = normalize(W^H u) held exactly, and a step of
# the optimizer later still nearly; along a wrong dim the two are strangers.
_NEAR = 0.1
_CLEARER = 10.0
_UNIT = 1e-4  # how far from 1 the length of a vector may be in float32


class TorchNorm:
    """The tensors of one spectral norm, to ask torch about: whatever it computes is the truth.

    Raises:
        CheckpointError: if they are of dtypes that torch does not multiply.

    Attributes:
        site: where they are from.
        parts: all of them, by the names in ``site.keys``.
        weight: the raw weight.
        u: the left vector.
        v: the right vector; None where it must be solved for, as torch does on loading.
        normalised: the weight that a checkpoint from before v holds beside them.
    """

    def __init__(self, site: Reparametrization, tensors: Mapping[str, Any]) -> None:
        self.site = site
        self.parts = {part: aligned(tensors[key]) for part, key in site.keys.items()}
        dtypes = {part.dtype: dtype_name(part) for part in self.parts.values()}
        if len(dtypes) > 1 or any(dtype.itemsize == 1 for dtype in dtypes):
            raise CheckpointError(
                f"torch cannot normalise '{site.name}': its parts are "
                f"{quote_names(dtypes.values())}"
            )
        self.weight: Tensor = self.parts["weight"]
        self.u: Tensor = self.parts["u"]
        self.v: Tensor | None = self.parts.get("v")
        self.normalised: Tensor | None = self.parts.get("normalised")

    def matrix(self, dim: int) -> Tensor:
        """Return the weight as torch reshapes it for ``dim``."""
        return SpectralNorm(dim=dim).reshape_weight_to_matrix(self.weight)

    def value(self, dim: int) -> Tensor:
        """Return the weight that an eval-mode forward uses.

        Raises:
            CheckpointError: if torch cannot compute it.
        """
        try:
            with torch.no_grad():
                if self.site.spelling == "hook":
                    return self._hook_value(dim)
                return self._parametrization_value(dim)
        except RuntimeError as error:
            raise CheckpointError(
                f"torch cannot normalise '{self.site.name}': {str(error).splitlines()[0]}"
            ) from error

    def right_vector(self, dim: int) -> Tensor:
        """Return v; where the checkpoint has none, the one that torch solves for on loading."""
        if self.v is not None and self.normalised is None:
            return self.v
        state = {"weight_orig": self.weight, "weight_u": self.u, "weight": self.normalised}
        if self.v is not None:
            state["weight_v"] = self.v
        pre_hook = SpectralNormLoadStateDictPreHook(SpectralNorm("weight", dim=dim))
        pre_hook(state, "", {}, True, [], [], [])
        v = state["weight_v"]
        assert v is not None  # the hook has just stored it
        return v

    def _hook_value(self, dim: int) -> Tensor:
        module = nn.Module()
        module.weight_orig = self.weight
        module.weight_u, module.weight_v = self.u, self.right_vector(dim)
        norm = SpectralNorm("weight", dim=dim)
        return norm.compute_weight(module, do_power_iteration=False)

    def _parametrization_value(self, dim: int) -> Tensor:
        # On the meta device its constructor computes nothing and draws no random number.
        norm = SpectralNormLink(self.weight.to("meta"), dim=dim).eval()
        norm._buffers.update(_u=self.u, _v=self.v)
        value: Tensor = norm(self.weight)
        return value


def compute_normalised(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> Tensor:
    """Return the weight that an eval-mode forward uses, as torch computes it.

    Raises:
        CheckpointError: if the dim cannot be told, or the weight would not be finite.
    """
    norm = TorchNorm(site, tensors)
    for part in ("weight", "u", "v"):
        if part in norm.parts:
            require_finite(site.keys[part], norm.parts[part])
    candidates = fitting_dims(norm)
    if len(candidates) > 1 or site.name in dims:
        candidates = [decide_dim(norm, dims)]
    value = norm.value(candidates[0])
    if not is_finite(value):
        raise zero_sigma(site.name)
    return value


def make_vectors(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> list[Entry]:
    """Return weight, u and v, in the order of their keys."""
    weight, u = spec_of(tensors, site.keys["weight"]), spec_of(tensors, site.keys["u"])
    columns = math.prod(weight.shape) // max(math.prod(u.shape), 1)
    v = spec_of(tensors, site.keys["v"]) if "v" in site.keys else Spec(u.dtype, (columns,))

    def right_vector() -> Tensor:
        if "v" in site.keys and "normalised" not in site.keys:
            return site.read("v", tensors)
        norm = TorchNorm(site, tensors)
        return norm.right_vector(decide_dim(norm, dims))

    return [
        Entry(weight, lambda: site.read("weight", tensors)),
        Entry(u, lambda: site.read("u", tensors)),
        Entry(v, right_vector),
    ]


def describe_difference(site: Reparametrization, tensors: Mapping[str, Any]) -> str:
    """Return why torch's other spelling would be another network; empty if it is the same."""
    if len(site.shape) == 1:
        return "torch's parametrization treats a vector in another way than its hook does"
    if spec_of(tensors, site.keys["weight"]).dtype.is_complex:
        return "torch's parametrization conjugates u and its hook does not"
    return ""


def zero_sigma(name: str) -> CheckpointError:
    """Return the error about a weight that cannot be divided by its sigma."""
    return CheckpointError(
        f"sigma of '{name}' is 0 or too small to divide by, so its normalised weight would "
        "not be finite"
    )


def length_of_vectors(site: Reparametrization, tensors: Mapping[str, Any]) -> float:
    """Return the product of the lengths of u and v; 1 if both are unit vectors as torch keeps them.

    Sigma is ``u^H W v`` and so too small by this factor where it is less than 1.
    """
    product = 1.0
    # Where v is solved for, torch chooses its length to suit sigma.
    names = ("u", "v") if "normalised" not in site.keys else ("u",)
    for key in (site.keys[part] for part in names if part in site.keys):
        vector = tensors[key]
        length = float(torch.linalg.vector_norm(vector.detach().double()))
        if abs(length - 1) > max(_UNIT, torch.finfo(vector.dtype).eps):
            product *= length
    return product


def describe_length(length: float) -> str:
    """Return what a length other than 1 means for the network."""
    too = ("small", "large") if length < 1 else ("large", "small")
    factor = max(length, 1 / length) if length else math.inf
    return (
        f"u or v is no unit vector (product of their lengths {length:.4g}), as after averaging "
        f"weights (EMA, SWA): sigma is too {too[0]}, and the weight in eval mode {factor:.4g} "
        f"times too {too[1]}"
    )


def notes_on_lengths(
    sites: Sequence[Reparametrization], tensors: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a sentence about vectors that are no unit vectors, or nothing if all are."""
    lengths = {
        link.name: length
        for site in sites
        for link in site.links or (site,)
        if link.group == "spectral_norm" and not site.blocked
        if (length := length_of_vectors(link, tensors)) != 1
    }
    if not lengths:
        return ()
    worst = max(lengths.values(), key=lambda length: abs(math.log(length or math.ulp(0))))
    return (f"{quote_names(lengths)}: {describe_length(worst)}",)


def decide_dim(norm: TorchNorm, dims: Mapping[str, int]) -> int:
    """Return the dim of one site.

    By the shapes of u and v, and where several dims fit, as for square weights, by the one
    for which the vectors are each other's image under the weight.

    Args:
        norm: the tensors of the site.
        dims: dims that the caller knows, by qualified name of the tensor.

    Raises:
        CheckpointError: if no dim fits, or several do and the vectors cannot tell.
    """
    fitting = fitting_dims(norm)
    site = norm.site
    if site.name in dims:
        ndim = len(site.shape)
        dim = dims[site.name]
        if not -ndim <= dim < ndim or dim % ndim not in fitting:
            raise CheckpointError(
                f"'{site.name}' {list(site.shape)} with u of "
                f"{format_count(norm.u.numel(), 'element')} has dim "
                f"{_either(fitting)}, got --dim {site.name}={dim}"
            )
        return dim % ndim
    if len(fitting) == 1 or norm.u.numel() == 1:  # dimensions of size 1 give the same matrix
        return fitting[0]
    (best, dim), (second, _) = sorted((_residual(norm, d), d) for d in fitting)[:2]
    if best < _NEAR and second > _CLEARER * best:
        return dim
    raise CheckpointError(
        f"cannot tell the dim of '{site.name}' {list(site.shape)}: its shape and vectors fit "
        f"{_either(fitting)}; say which with --dim {site.name}={fitting[0]}"
    )


def fitting_dims(norm: TorchNorm) -> list[int]:
    """Return the dims for which u and v have the lengths of rows and columns.

    Raises:
        CheckpointError: if there is none.
    """
    shape, u, v = norm.site.shape, norm.u, norm.v
    total = math.prod(shape)
    fitting = [
        dim
        for dim, size in enumerate(shape)
        if u.shape == (size,) and (v is None or v.shape == (total // max(size, 1),))
    ]
    if not fitting:
        columns = "" if v is None else f" and v has shape {list(v.shape)}"
        raise CheckpointError(
            f"the vectors of '{norm.site.name}' fit no dim of its shape {list(shape)}: u has "
            f"shape {list(u.shape)}{columns}"
        )
    return fitting


def _residual(norm: TorchNorm, dim: int) -> float:
    """Return how far the vectors are from each other's images under the weight, 0 if they are."""
    matrix = norm.matrix(dim)
    u = norm.u
    with torch.no_grad():
        if norm.normalised is not None or norm.v is None:
            # Of the right dim ``W^H u`` is as long as the sigma that the stored weight was
            # divided by.
            assert norm.normalised is not None  # one of the two is always there
            sigma = norm.weight.norm() / norm.normalised.norm()
            length = torch.linalg.vector_norm(torch.mv(matrix.mH, u))
            return float((length / sigma - 1).abs())
        return min(
            _distance(u, torch.mv(matrix, norm.v)), _distance(norm.v, torch.mv(matrix.mH, u))
        )


def _distance(vector: Tensor, image: Tensor) -> float:
    """Return how far apart two directions are; averaged vectors are no unit vectors."""
    one, other = (part / torch.linalg.vector_norm(part) for part in (vector, image))
    distance = float(torch.linalg.vector_norm(one - other))
    return distance if math.isfinite(distance) else math.inf


def _either(dims: list[int]) -> str:
    return " or ".join(map(str, dims))
