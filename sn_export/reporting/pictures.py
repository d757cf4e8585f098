"""Samples of pictures and sound, from the bytes in a report's JSON to PNG and SVG paths."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .numbers import Number

_COLOURS = {1: 0, 3: 2, 4: 6}  # PNG's colour type by the number of channels
_MOST = 2**22  # bytes; no report of ours holds as many in one picture
_TITLES = ("model", "file", "difference")


@dataclass(frozen=True)
class View:
    """One of the three drawings of a sample: its title, and a PNG as data, or a path of SVG."""

    title: str
    source: str


@dataclass(frozen=True)
class Sample:
    """One sample as the page shows it; see `sn_export.results.Picture`."""

    kind: str
    label: str
    width: int
    height: int
    low: Number
    high: Number
    largest: Number
    views: tuple[View, ...]


def read_samples(pictures: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Return the samples of an output.

    Args:
        pictures: of the JSON.

    Raises:
        KeyError: if something is missing.
        ValueError: if a picture has not as many bytes as its size says.
    """
    return [
        Sample(
            entry["kind"],
            entry["sample"],
            entry["width"],
            entry["height"],
            entry["low"],
            entry["high"],
            entry["largest"],
            tuple(View(title, _source(entry, title)) for title in _TITLES),
        )
        for entry in pictures
    ]


def _source(entry: Mapping[str, Any], title: str) -> str:
    width, height = int(entry["width"]), int(entry["height"])
    is_sound = entry["kind"] == "sound"
    channels = 1 if is_sound or title == "difference" else int(entry["channels"])
    size = width * height * channels
    if min(width, height) < 1 or size > _MOST or channels not in _COLOURS:
        raise ValueError(f"a picture of {width} x {height} with {channels} channels")
    pixels = base64.b64decode(entry[title], validate=True)
    if len(pixels) != size or (is_sound and height != 2):
        raise ValueError(f"the {title} of '{entry['sample']}' has {len(pixels)} bytes, not {size}")
    if is_sound:
        return _path(pixels[:width], pixels[width:], from_bottom=title == "difference")
    png = base64.b64encode(_png(width, height, channels, pixels)).decode()
    return f"data:image/png;base64,{png}"


def _png(width: int, height: int, channels: int, pixels: bytes) -> bytes:
    """Return a PNG file (RFC 2083) of 8 bits a channel, without filters."""
    row = width * channels
    lines = b"".join(b"\0" + pixels[i : i + row] for i in range(0, len(pixels), row))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _path(lowest: bytes, highest: bytes, from_bottom: bool) -> str:
    """Return a path around a wave, 256 high and a unit wide for each column.

    ``_path(bytes([64]), bytes([128]), False)`` is ``"M0,127V192H1V127Z"``: y grows downwards.
    """
    return "".join(
        f"M{x},{255 - high}V{256 if from_bottom else 256 - low}H{x + 1}V{255 - high}Z"
        for x, (low, high) in enumerate(zip(lowest, highest, strict=True))
        if high or not from_bottom
    )
