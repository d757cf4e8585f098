"""Spectral norm in a state dict: its dim, its vectors, and the weight that torch computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from ..errors import CheckpointError
from ..running import SpectralNormLink
from ..text import format_count, name_dtype, quote_names
from .lazy_tensors import Entry, Spec, align_memory, get_spec, is_finite, require_finite
from .reparametrizations import Reparametrization

# In training mode a forward sets u = normalize(W v) and v = normalize(W^H u), and a step of the
# optimizer changes W a little. So along the right dim one of the two nearly holds, and along a
# wrong one both fail. The right dim has a residual below _NEAR, _CLEARER times below the others.
_NEAR = 0.1
_CLEARER = 10.0
_UNIT = 1e-4  # how far from 1 the length of a vector may be in float32


class TorchNorm:
    """The tensors of one spectral norm, of which torch's own classes compute what is asked for.

    Raises:
        CheckpointError: if they have dtypes that torch does not multiply.

    Attributes:
        site: the tensor that they are parts of.
        parts: all parts, by the names in ``site.keys``.
        weight: the raw weight.
        u: the left vector.
        v: the right vector; None if it was not saved, and torch solves for it on loading.
        normalised: the weight in use, which old versions of torch saved beside them.
    """

    def __init__(self, site: Reparametrization, tensors: Mapping[str, Any]) -> None:
        self.site = site
        self.parts = {part: align_memory(tensors[key]) for part, key in site.keys.items()}
        dtypes = {part.dtype: name_dtype(part) for part in self.parts.values()}
        if len(dtypes) > 1 or any(dtype.itemsize == 1 for dtype in dtypes):
            raise CheckpointError(
                f"torch cannot normalise '{site.name}': its parts are "
                f"{quote_names(dtypes.values())}"
            )
        self.weight: Tensor = self.parts["weight"]
        self.u: Tensor = self.parts["u"]
        self.v: Tensor | None = self.parts.get("v")
        self.normalised: Tensor | None = self.parts.get("normalised")

    def make_matrix(self, dim: int) -> Tensor:
        """Return the weight as torch reshapes it for ``dim``."""
        return SpectralNorm(dim=dim).reshape_weight_to_matrix(self.weight)

    def compute_value(self, dim: int) -> Tensor:
        """Return the weight that an eval-mode forward uses.

        Raises:
            CheckpointError: if torch cannot compute it.
        """
        try:
            with torch.no_grad():
                if self.site.spelling == "hook":
                    return self._compute_hook(dim)
                return self._compute_parametrization(dim)
        except RuntimeError as error:
            raise CheckpointError(
                f"torch cannot normalise '{self.site.name}': {str(error).splitlines()[0]}"
            ) from error

    def find_right_vector(self, dim: int) -> Tensor:
        """Return v, or the one that torch solves for on loading if the checkpoint is so old."""
        if self.v is not None and self.normalised is None:
            return self.v
        state = {"weight_orig": self.weight, "weight_u": self.u, "weight": self.normalised}
        pre_hook = SpectralNormLoadStateDictPreHook(SpectralNorm("weight", dim=dim))
        pre_hook(state, "", {}, True, [], [], [])
        v = state["weight_v"]
        assert v is not None  # the hook has just stored it
        return v

    def _compute_hook(self, dim: int) -> Tensor:
        module = nn.Module()
        module.weight_orig = self.weight
        module.weight_u, module.weight_v = self.u, self.find_right_vector(dim)
        norm = SpectralNorm("weight", dim=dim)
        return norm.compute_weight(module, do_power_iteration=False)

    def _compute_parametrization(self, dim: int) -> Tensor:
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
    candidates = find_fitting_dims(norm)
    if len(candidates) > 1 or site.name in dims:
        candidates = [decide_dim(norm, dims)]
    value = norm.compute_value(candidates[0])
    if not is_finite(value):
        raise report_zero_sigma(site.name)
    return value


def make_vectors(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> list[Entry]:
    """Return weight, u and v, in the order of their keys."""
    weight, u = get_spec(tensors, site.keys["weight"]), get_spec(tensors, site.keys["u"])
    columns = math.prod(weight.shape) // max(math.prod(u.shape), 1)
    v = get_spec(tensors, site.keys["v"]) if "v" in site.keys else Spec(u.dtype, (columns,))

    def find_right_vector() -> Tensor:
        if "v" in site.keys and "normalised" not in site.keys:
            return site.read("v", tensors)
        norm = TorchNorm(site, tensors)
        return norm.find_right_vector(decide_dim(norm, dims))

    return [
        Entry(weight, lambda: site.read("weight", tensors)),
        Entry(u, lambda: site.read("u", tensors)),
        Entry(v, find_right_vector),
    ]


def describe_difference(site: Reparametrization, tensors: Mapping[str, Any]) -> str:
    """Return why torch's other spelling would compute something else; ``""`` if it does not."""
    if len(site.shape) == 1:
        return "torch's parametrization treats a vector in another way than its hook does"
    if get_spec(tensors, site.keys["weight"]).dtype.is_complex:
        return "torch's parametrization conjugates u and its hook does not"
    return ""


def report_zero_sigma(name: str) -> CheckpointError:
    """Return the error for a weight that cannot be divided by its sigma."""
    return CheckpointError(
        f"sigma of '{name}' is 0 or too small to divide by, so its normalised weight would "
        "not be finite"
    )


def measure_vectors(site: Reparametrization, tensors: Mapping[str, Any]) -> float:
    """Return the product of the lengths of u and v, which is 1 if both are unit vectors.

    Torch keeps unit vectors. Sigma is ``u^H W v``, so it is off by this factor.
    """
    product = 1.0
    # If torch solves for v, it chooses the length of v to suit sigma.
    names = ("u", "v") if "normalised" not in site.keys else ("u",)
    for key in (site.keys[part] for part in names if part in site.keys):
        vector = tensors[key]
        length = float(torch.linalg.vector_norm(vector.detach().double()))
        if abs(length - 1) > max(_UNIT, torch.finfo(vector.dtype).eps):
            product *= length
    return product


def describe_length(length: float) -> str:
    """Return a sentence on what a product of lengths other than 1 means for the network."""
    too = ("small", "large") if length < 1 else ("large", "small")
    factor = max(length, 1 / length) if length else math.inf
    return (
        f"u or v is no unit vector (product of their lengths {length:.4g}), as after averaging "
        f"weights (EMA, SWA): sigma is too {too[0]}, and the weight in eval mode {factor:.4g} "
        f"times too {too[1]}"
    )


def describe_lengths(
    sites: Sequence[Reparametrization], tensors: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a sentence about vectors that are no unit vectors, or nothing if all are."""
    lengths = {
        link.name: length
        for site in sites
        for link in site.links or (site,)
        if link.group == "spectral_norm" and not site.blocked
        if (length := measure_vectors(link, tensors)) != 1
    }
    if not lengths:
        return ()
    worst = max(lengths.values(), key=lambda length: abs(math.log(length or math.ulp(0))))
    return (f"{quote_names(lengths)}: {describe_length(worst)}",)


def decide_dim(norm: TorchNorm, dims: Mapping[str, int]) -> int:
    """Return the dim of one site.

    The shapes of u and v decide. If several dims fit, as for square weights, it is the one along
    which the weight maps the vectors to each other.

    Args:
        norm: the tensors of the site.
        dims: dims that the caller knows, by qualified name of the tensor.

    Raises:
        CheckpointError: if no dim fits, the one in ``dims`` does not, or several fit and the
            vectors do not tell which.
    """
    fitting = find_fitting_dims(norm)
    site = norm.site
    if site.name in dims:
        parts = f"u of {format_count(norm.u.numel(), 'element')}"
        return require_fitting_dim(site, dims[site.name], fitting, parts)
    if len(fitting) == 1 or norm.u.numel() == 1:  # dimensions of size 1 give the same matrix
        return fitting[0]
    (best, dim), (second, _) = sorted((_measure_residual(norm, d), d) for d in fitting)[:2]
    if best < _NEAR and second > _CLEARER * best:
        return dim
    raise CheckpointError(
        f"cannot tell the dim of '{site.name}' {list(site.shape)}: its shape and vectors fit "
        f"{join_dims(fitting)}; say which with --dim {site.name}={fitting[0]}"
    )


def require_fitting_dim(
    site: Reparametrization, dim: int, fitting: Sequence[int | None], parts: str
) -> int:
    """Return a given dim, counted from the front, if it is one of those that fit.

    Args:
        site: the tensor.
        dim: the dim that the caller gives; a negative one is counted from the end.
        fitting: the dims that the shapes allow.
        parts: the part whose shape decides, for the message.

    Raises:
        CheckpointError: if it does not fit.
    """
    ndim = len(site.shape)
    if not -ndim <= dim < ndim or dim % ndim not in fitting:
        raise CheckpointError(
            f"'{site.name}' {list(site.shape)} with {parts} has dim {join_dims(fitting)}, got "
            f"--dim {site.name}={dim}"
        )
    return dim % ndim


def find_fitting_dims(norm: TorchNorm) -> list[int]:
    """Return the dims for which u has as many elements as rows, and v as many as columns.

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


def _measure_residual(norm: TorchNorm, dim: int) -> float:
    """Return how far the weight is from mapping the vectors to each other; 0 if it does."""
    matrix = norm.make_matrix(dim)
    u = norm.u
    with torch.no_grad():
        if norm.normalised is not None or norm.v is None:
            # Along the right dim the length of ``W^H u`` is sigma, by which the weight was divided.
            assert norm.normalised is not None  # a site has v or this weight, or is blocked
            sigma = norm.weight.norm() / norm.normalised.norm()
            length = torch.linalg.vector_norm(torch.mv(matrix.mH, u))
            return float((length / sigma - 1).abs())
        return min(
            _measure_distance(u, torch.mv(matrix, norm.v)),
            _measure_distance(norm.v, torch.mv(matrix.mH, u)),
        )


def _measure_distance(vector: Tensor, image: Tensor) -> float:
    """Return the distance of two directions; vectors that were averaged are no unit vectors."""
    one, other = (part / torch.linalg.vector_norm(part) for part in (vector, image))
    distance = float(torch.linalg.vector_norm(one - other))
    return distance if math.isfinite(distance) else math.inf


def join_dims(dims: Iterable[int | None]) -> str:
    """Return ``"0 or 1"``."""
    return " or ".join(map(str, dims))
