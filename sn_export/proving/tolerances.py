"""The settings of a proof, and its tolerances: by dtype, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..results import ProofDtype, Tolerance
from ..text import as_plain_integer, as_plain_number, name_dtype, require_choice
from .precision import PROOF_DTYPES
from .session import DEFAULT_PROVIDERS, require_providers

# rtol, and atol in units of the largest reference value of the output.
DEFAULT_TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-4),
    "float16": (1e-2, 1e-2),
    "bfloat16": (5e-2, 5e-2),
}


def require_tolerances(
    rtol: Tolerance, atol: Tolerance, outputs: Sequence[str] | None = None
) -> tuple[Tolerance, Tolerance]:
    """Return both tolerances in numbers of Python, if a comparison can use them.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance, in units of the output.
        outputs: the names of the file's outputs, where they are known already.

    Raises:
        TypeError: for a key that is neither a name nor a position.
        ValueError: for a tolerance that is negative or not a number, or a key that is no output.
    """
    return _require_each("rtol", rtol, outputs), _require_each("atol", atol, outputs)


def get_tolerance(tolerance: Tolerance, position: int, name: str) -> float | None:
    """Return the tolerance for one output, None where the default for its dtype applies."""
    if not isinstance(tolerance, Mapping):
        return tolerance
    return tolerance.get(name, tolerance.get(position))


def find_coarsest_dtype(tensors: Iterable[Tensor]) -> str | None:
    """Return the name of the floating dtype with the widest default tolerance, if there is one.

    A network that computes in half precision anywhere has no more than that in its outputs.
    """
    names = {name_dtype(tensor) for tensor in tensors} & DEFAULT_TOLERANCES.keys()
    return max(names, key=lambda name: DEFAULT_TOLERANCES[name], default=None)


def resolve_tolerance(
    expected: Tensor, rtol: float | None, atol: float | None, coarsest: str | None
) -> tuple[float, float]:
    """Return rtol and atol, in units of ``expected``; by dtype and its largest value where None.

    Args:
        expected: the reference.
        rtol: relative tolerance, if one was given.
        atol: absolute tolerance, if one was given.
        coarsest: the coarsest dtype that the network computes in, if that is known.
    """
    default, scaled = DEFAULT_TOLERANCES.get(name_dtype(expected), (0.0, 0.0))
    if coarsest is not None and expected.is_floating_point():
        default, scaled = max((default, scaled), DEFAULT_TOLERANCES[coarsest])
    if rtol is None:
        rtol = default
    if atol is not None:
        return rtol, atol
    return rtol, scaled * find_largest(expected)


def find_largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude in ``tensor``, or 0."""
    values = tensor.detach().cpu()
    values = values.abs() if values.is_complex() else values.to(torch.float64)
    if not values.numel():
        return 0.0
    lowest, highest = map(float, values.aminmax())
    if not math.isfinite(lowest + highest):
        values = values.where(values.isfinite(), 0)
        lowest, highest = map(float, values.aminmax())
    return max(abs(lowest), abs(highest))


def _require_each(name: str, value: Tolerance, outputs: Sequence[str] | None) -> Tolerance:
    if not isinstance(value, Mapping):
        return _require_number(name, value)
    found: dict[Any, Any] = {}
    for key, entry in value.items():
        known = key if isinstance(key, str) else as_plain_integer(key)
        if known is None:
            raise TypeError(f"{name} must be by name or position of an output, got the key {key!r}")
        found[known] = _require_number(f"{name}[{known!r}]", entry)
    if outputs is not None:
        _require_known(name, found, outputs)
    return found


def _require_number(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = as_plain_number(value)
    if number is None or not number >= 0:
        raise ValueError(f"{name} must be 0 or more, got {value!r}")
    return number


def _require_known(name: str, tolerance: Mapping[Any, float], outputs: Sequence[str]) -> None:
    for key in tolerance:
        if key not in outputs if isinstance(key, str) else not 0 <= key < len(outputs):
            raise ValueError(f"{name} names the output {key!r}, the file has {list(outputs)}")
        if isinstance(key, int) and outputs[key] in tolerance:
            raise ValueError(f"{name} names the output '{outputs[key]}' twice, also as {key}")


@dataclass(frozen=True)
class ProofSettings:
    """How a file is run and held against the model.

    Attributes:
        rtol: relative tolerance, for all outputs or for each; None for the dtype's default.
        atol: absolute tolerance in units of the output, likewise.
        providers: onnxruntime execution providers, in order of preference.
        proof_dtype: dtype of the copy that is run in the place of the file.
        input_names: what the file calls its inputs, by their names in the forward's signature;
            the same names where None.
        images: the outputs of which samples are shown; None for those that look like it.
    """

    rtol: Tolerance = None
    atol: Tolerance = None
    providers: Sequence[str] = DEFAULT_PROVIDERS
    proof_dtype: ProofDtype | None = None
    input_names: Mapping[str, str] | None = None
    images: Sequence[str] | None = None

    def check(self, outputs: Sequence[str] | None = None) -> ProofSettings:
        """Return the settings with tolerances in numbers of Python, if they can be used.

        Args:
            outputs: the names of the file's outputs, where they are known already.

        Raises:
            TypeError: for a tolerance by a key that is neither a name nor a position, or
                providers or images that are no sequence.
            ValueError: for a tolerance that is negative or that names no output, an unknown
                provider, a dtype in which no proof can be made, or an image that is no output.
        """
        rtol, atol = require_tolerances(self.rtol, self.atol, outputs)
        require_providers(self.providers)
        require_choice("proof_dtype", self.proof_dtype, PROOF_DTYPES)
        _require_images(self.images, outputs)
        return replace(self, rtol=rtol, atol=atol)

    def get_tolerances(self, position: int, name: str) -> tuple[float | None, float | None]:
        """Return rtol and atol of one output, None where the default for its dtype applies."""
        return (get_tolerance(self.rtol, position, name), get_tolerance(self.atol, position, name))


def _require_images(images: Sequence[str] | None, outputs: Sequence[str] | None) -> None:
    if images is None:
        return
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise TypeError(f"images must be a sequence of names of outputs, got {images!r}")
    unknown = next((name for name in images if outputs is not None and name not in outputs), None)
    if unknown is not None:
        raise ValueError(f"images names the output {unknown!r}, the file has {list(outputs or ())}")
