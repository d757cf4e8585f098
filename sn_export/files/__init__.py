"""Where files go, and how they get there: several together or not at all. No torch."""

from .drafts import DraftFolders, Drafts, require_writable
from .paths import (
    TEXT_FORMATS,
    are_one_place,
    as_path,
    disk_errors_as,
    find_disk_error,
    name_side_file,
    open_regular,
    read_onnx,
    require_folder_place,
    require_onnx_place,
    require_place,
    require_regular,
    starts_as_onnx,
)
from .publishing import publish

__all__ = [
    "TEXT_FORMATS",
    "DraftFolders",
    "Drafts",
    "are_one_place",
    "as_path",
    "disk_errors_as",
    "find_disk_error",
    "name_side_file",
    "open_regular",
    "publish",
    "read_onnx",
    "require_folder_place",
    "require_onnx_place",
    "require_place",
    "require_regular",
    "require_writable",
    "starts_as_onnx",
]
