"""What the first bytes of a file say it is, whatever its name."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..files import open_regular
from ..text import quote_name

_TORCH = (b"PK", b"\x80")  # a zip archive, or a pickle
# The first bytes of other files, what these are, and what the user can do.
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with git lfs pull"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it"),
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\x93NUMPY", "a numpy array, not a checkpoint of torch"),
)


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file.

    Raises:
        CheckpointError: if it cannot be read, or is empty.
    """
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {quote_name(path)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {quote_name(path)}: {reason}") from error
    if not head:
        raise CheckpointError(f"{quote_name(path)} is empty")
    return head


def is_of_torch(head: bytes) -> bool:
    """Whether a file may be one of `torch.save`, or of numpy: a zip archive or a pickle."""
    return head.startswith(_TORCH)


def refuse_other_format(path: Path, head: bytes) -> None:
    """Raise a CheckpointError that names the format of a file, if it is one that is not read."""
    for start, kind in _OTHERS:
        if head.startswith(start):
            raise CheckpointError(f"{quote_name(path)} is {kind}")
    if head[:1] == b"\x08" and (head[2:3] == b"\x12" or path.suffix == ".onnx"):
        raise CheckpointError(
            f"{quote_name(path)} is an ONNX file, which holds a graph; give the checkpoint that "
            "it was made from"
        )


def require_torch(path: Path, head: bytes) -> None:
    """Raise a CheckpointError that says what a file is, unless it may be one of torch."""
    if is_of_torch(head):
        return
    refuse_other_format(path, head)
    raise CheckpointError(
        f"{quote_name(path)} is no checkpoint: it starts with {head[:8]!r}, which is neither "
        "torch's format nor safetensors"
    )
