"""Where files go, and how they get there: several together or not at all. No torch."""

from .drafts import (
    DraftFolders as DraftFolders,
    Drafts as Drafts,
    require_writable as require_writable,
)
from .paths import (
    TEXT_FORMATS as TEXT_FORMATS,
    are_one_place as are_one_place,
    as_path as as_path,
    disk_errors_as as disk_errors_as,
    find_disk_error as find_disk_error,
    name_side_file as name_side_file,
    open_regular as open_regular,
    read_onnx as read_onnx,
    require_folder_place as require_folder_place,
    require_onnx_place as require_onnx_place,
    require_place as require_place,
    require_regular as require_regular,
    starts_as_onnx as starts_as_onnx,
)
from .publishing import publish as publish
