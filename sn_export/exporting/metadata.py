"""What a file says about its making: ``metadata_props``, the same bytes for the same input.

torch stays the file's ``producer_name``, since tools go by it; the keys of sn_export begin with
``sn_export.``. Nothing of the machine is written: no path, user, host or date.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..files import as_path
from ..freezing import ParametrizationInfo, SpectralNormInfo

PREFIX = "sn_export."
_CHUNK = 2**20
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


def require_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the user's metadata, if it can be written.

    Raises:
        TypeError: if it is no mapping of text to text.
        ValueError: for an empty key, or one that begins with ``sn_export.``.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of text to text, got {metadata!r}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must be a mapping of text to text, got {key!r}: {value!r}")
        if not key or key.startswith(PREFIX):
            raise ValueError(f"metadata needs keys that do not begin with '{PREFIX}', got {key!r}")
        for text in (key, value):
            if not _is_utf8(text):
                raise ValueError(f"metadata must be valid Unicode, got {text!r}")
    return metadata


def file_metadata(
    exporter: str,
    versions: Mapping[str, str],
    frozen: Sequence[SpectralNormInfo | ParametrizationInfo],
    source: Path | None,
    metadata: Mapping[str, str],
    draws: str | None = None,
) -> dict[str, str]:
    """Return the metadata of a file.

    Args:
        exporter: the exporter that made it.
        versions: versions by package.
        frozen: the tensors under spectral norm.
        source: the checkpoint that the weights came from.
        metadata: the user's own keys.
        draws: how the forward drew random numbers.

    Returns:
        Text by key: ``sn_export.exporter``; ``sn_export.versions``, a JSON object;
        ``sn_export.frozen``, a JSON object of sigma as stored by name of the tensor, to six
        digits (null where it is not finite, or there is none); ``sn_export.source_sha256`` where
        there is a source; ``sn_export.draws`` where the forward drew zeros; and the user's keys.
        The file has them all in alphabetical order.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    sigmas = {
        info.name: _round_sigma(info.sigma) if isinstance(info, SpectralNormInfo) else None
        for info in frozen
    }
    made = {
        f"{PREFIX}exporter": exporter,
        f"{PREFIX}versions": json.dumps(dict(versions)),
        f"{PREFIX}frozen": json.dumps(sigmas, allow_nan=False),
    }
    if source is not None:
        made[f"{PREFIX}source_sha256"] = file_sha256(source)
    if draws is not None:
        made[f"{PREFIX}draws"] = draws
    return made | dict(metadata)


def require_source(source: str | os.PathLike[str] | None) -> Path | None:
    """Return the path of the checkpoint.

    Raises:
        TypeError: if it is no path.
        FileNotFoundError: if there is no such file.
    """
    if source is None:
        return None
    path = as_path(source, "source")
    if not path.is_file():
        raise FileNotFoundError(f"source must be a file, there is none at '{path}'")
    return path


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of sn_export and of the packages behind it."""
    found = {}
    for package in ("sn-export", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _round_sigma(sigma: float) -> float | None:
    # Six digits: sums in another order, as another number of threads makes them, agree in these.
    return float(f"{sigma:.6g}") if math.isfinite(sigma) else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
