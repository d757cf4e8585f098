"""Samples of outputs that are pictures or sound, small enough to travel in the JSON of a report.

A network whose outputs are looked at or listened to is judged by eye before anybody reads numbers.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..results import Picture

MOST = 4  # samples of one output
_OUTPUTS = 4  # that are shown where the user names none
_SIDE = 128  # pixels of a picture, which is a quarter of a megabyte in JSON with its difference
_COLUMNS = 400  # of a sound
_SMALLEST, _SHORTEST = 8, 64  # pixels and numbers; less is a feature map, or a list of scores

Kind = Literal["picture", "sound"]


def choose_kind(shape: Sequence[int]) -> Kind | None:
    """Return what an output of a shape can be shown as, None if it is neither.

    ::

        choose_kind((8, 3, 64, 64))  # "picture": N x 1, 3 or 4 x H x W
        choose_kind((2, 1, 16000))  # "sound": N x 1 x T
    """
    if len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape) > 0:
        return "picture"
    return "sound" if len(shape) == 3 and shape[1] == 1 and min(shape) > 0 else None


def find_shown(
    names: Sequence[str], outputs: Sequence[Tensor], wanted: Sequence[str] | None
) -> frozenset[str]:
    """Return the names of the outputs that are shown.

    Args:
        names: of all outputs, in order.
        outputs: the outputs for the example.
        wanted: those that the user named; None for the first four that look like it.

    Raises:
        ValueError: for one that is neither a picture nor a sound.
    """
    found = dict(zip(names, outputs, strict=False))
    if wanted is None:
        return frozenset([name for name in found if _looks_like_it(found[name])][:_OUTPUTS])
    for name in wanted:
        if name in found and (choose_kind(found[name].shape) is None or found[name].is_complex()):
            raise ValueError(
                f"images names the output '{name}', of shape {list(found[name].shape)}: pictures "
                "are N x 1, 3 or 4 x H x W, and sound is N x 1 x T"
            )
    return frozenset(wanted)


def _looks_like_it(output: Tensor) -> bool:
    kind = choose_kind(output.shape)
    if kind is None or not (output.is_floating_point() or output.dtype == torch.uint8):
        return False
    sizes = output.shape[2:]
    return min(sizes) >= (_SMALLEST if kind == "picture" else _SHORTEST)


def show_samples(
    label: str, expected: Tensor, got: Tensor, places: Iterable[int]
) -> Iterator[Picture]:
    """Yield samples of an output, as the model gives them and as the file does.

    Args:
        label: of the input set.
        expected: what the model gives, of a shape that `choose_kind` knows.
        got: what the file gives, of the same shape.
        places: of the samples in the batch.
    """
    kind = choose_kind(expected.shape)
    if kind is None:
        return
    for index in places:
        left, right = (one[index].detach().cpu().double().numpy() for one in (expected, got))
        name = label if len(expected) == 1 else f"{label}, number {index + 1} of the batch"
        yield (_show_picture if kind == "picture" else _show_sound)(name, left, right)


def _show_picture(label: str, expected: NDArray[np.float64], got: NDArray[np.float64]) -> Picture:
    """Show one picture of shape (channels, height, width)."""
    low, high = _choose_range(expected)
    error = _measure_errors(expected, got).max(0)
    step = -(-max(error.shape) // _SIDE)
    height, width = (-(-size // step) for size in error.shape)
    # The largest error of each block, so that none disappears.
    padded = np.pad(
        error, [(0, step * n - old) for n, old in zip((height, width), error.shape, strict=True)]
    )
    blocks = padded.reshape(height, step, width, step).max((1, 3))
    left, right = (
        _encode_bytes(one[:, ::step, ::step].transpose(1, 2, 0), low, high)
        for one in (expected, got)
    )
    largest = float(error.max())
    difference = _encode_bytes(blocks, 0.0, largest)
    channels = len(expected)
    return Picture(
        label, "picture", width, height, channels, low, high, largest, left, right, difference
    )


def _show_sound(label: str, expected: NDArray[np.float64], got: NDArray[np.float64]) -> Picture:
    """Show one sound of shape (1, length) by the lowest and highest number of each column."""
    error = _measure_errors(expected, got)[0]
    finite = expected[np.isfinite(expected)]
    loudest = float(np.abs(finite).max()) if finite.size else 0.0
    largest, columns = float(error.max()), min(_COLUMNS, len(error))
    edges = np.linspace(0, len(error), columns + 1).astype(int)[:-1]

    def envelope(values: NDArray[np.float64], low: float, high: float) -> str:
        bounds = [function.reduceat(values, edges) for function in (np.fmin, np.fmax)]
        return _encode_bytes(np.stack(bounds), low, high)

    left, right = (envelope(one[0], -loudest, loudest) for one in (expected, got))
    difference = envelope(error, 0.0, largest)
    return Picture(
        label, "sound", columns, 2, 1, -loudest, loudest, largest, left, right, difference
    )


def _measure_errors(expected: NDArray[np.float64], got: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the absolute errors; NaN is infinitely far from all, and equal infinities agree."""
    with np.errstate(invalid="ignore"):
        error = np.where(expected == got, 0.0, np.abs(expected - got))
    return np.where(np.isnan(error), np.inf, error)


def _choose_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return what black and white stand for: the common ranges of pictures, or the values' own."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for usual in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        # One that would use a fraction of the greys is not meant.
        if usual[0] <= low and high <= usual[1] and high - low > 0.1 * (usual[1] - usual[0]):
            return usual
    return low, high


def _encode_bytes(values: NDArray[np.float64], low: float, high: float) -> str:
    """Return values as bytes, 0 for ``low`` and 255 for ``high``, in base64."""
    width = high - low
    if not np.isfinite(width) or width <= 0:
        scaled = np.where(np.isinf(values) & (values > 0), 255.0, 0.0)
    else:
        scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / width)
    return base64.b64encode(scaled.round().clip(0, 255).astype(np.uint8).tobytes()).decode()
