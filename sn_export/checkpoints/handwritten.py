"""Handwritten spectral norm in a state dict: told of, and left as it is.

Only the model's code says what weight such keys stand for, so nothing here computes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..text import listed
from .lazy import spec_of

# What stands beside a raw weight: the wrapper of SAGAN code, BigGAN's mixin and its kin.
_BESIDE = (("u0", "sv0"), ("sn_u", "sn_sigma"))


def handwritten_norms(tensors: Mapping[str, Any]) -> list[str]:
    """Return the keys of the weights that look to be under a handwritten spectral norm.

    Known are ``weight_bar`` with ``weight_u``; ``weight`` with ``weight_u`` but without the
    ``weight_orig`` of torch's hook; and ``weight`` with ``u0`` and ``sv0``, with ``sn_u`` and
    ``sn_sigma``, or with a ``u`` of as many elements as it has rows.
    """
    return [key for key in tensors if _is_handwritten(tensors, key)]


def handwritten_notes(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence about `handwritten_norms`, or nothing where there are none."""
    found = handwritten_norms(tensors)
    if not found:
        return ()
    verb = "looks" if len(found) == 1 else "look"
    return (
        f"{listed(found)} {verb} like handwritten spectral norm, which is left as it is: only the "
        "model's code can tell the weight in use, and 'sn-export onnx' runs that",
    )


def _is_handwritten(tensors: Mapping[str, Any], key: str) -> bool:
    if key.endswith("_bar"):
        return f"{key.removesuffix('_bar')}_u" in tensors
    start, dot, name = key.rpartition(".")
    if name != "weight":
        return False
    if f"{key}_u" in tensors:
        return f"{key}_orig" not in tensors
    if any(all(start + dot + part in tensors for part in parts) for parts in _BESIDE):
        return True
    u = start + dot + "u"
    if u not in tensors or not _are_tensors(tensors, key, u):
        return False
    shape, vector = spec_of(tensors, key).shape, spec_of(tensors, u).shape
    return len(shape) > 1 and max(vector, default=0) == math.prod(vector) == shape[0]


def _are_tensors(tensors: Mapping[str, Any], *keys: str) -> bool:
    # Other values can be in torch's files; a lazy mapping would read its tensors to be asked.
    return not isinstance(tensors, dict) or all(isinstance(tensors[k], Tensor) for k in keys)
