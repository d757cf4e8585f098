"""A picture of rows of small images, each row under its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

PIXEL = 6  # side of a pixel of the small images
GAP = 6
CAPTION = 16  # height of a row's name


def save_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG with one row for each entry: images in -1 to 1, shaped (count, 1, h, w)."""
    count, _, height, width = next(iter(rows.values())).shape
    cell_width, cell_height = width * PIXEL + GAP, height * PIXEL + GAP + CAPTION
    picture = Image.new("L", (count * cell_width + GAP, len(rows) * cell_height + GAP), 255)
    draw = ImageDraw.Draw(picture)
    for row, (name, images) in enumerate(rows.items()):
        top = GAP + row * cell_height
        draw.text((GAP, top), name, fill=0)
        for column, image in enumerate(images):
            picture.paste(_upscale(image), (GAP + column * cell_width, top + CAPTION))
    picture.save(path)


def _upscale(image: Tensor) -> Image.Image:
    """Return dark strokes on white, every pixel as a square."""
    levels = image[0].clamp(-1, 1).sub(1).mul(-127.5).round().byte()
    height, width = levels.shape
    size = (width * PIXEL, height * PIXEL)
    return Image.fromarray(levels.numpy()).resize(size, Image.Resampling.NEAREST)
