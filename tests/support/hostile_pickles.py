"""Pickles that would run code, and files of every format that hold them."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

CODE = 240  # of the extension registry, for private use


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _stack_global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _attribute(target: bytes) -> bytes:
    """Return instructions that set an attribute by BUILD, as a slot and in the dictionary."""
    state = b"}" + _text("sn_hole") + b"K\x01s"
    return target + b"N" + state + b"\x86b" + state + b"b"


def hostile_pickles(trace: Path) -> dict[str, bytes]:
    """Return pickles by what they try.

    Those that succeed make the folder ``trace``, or ``sn_hole`` where none belongs.
    """
    path = _text(str(trace))
    mkdir = _global("posix", "mkdir")
    ordered, metadata = (
        _global("collections", "OrderedDict"),
        "torch.distributed.checkpoint.metadata",
    )
    tensor = _global("torch._utils", "_rebuild_tensor_v2")
    called = {
        f"call {module}.{name}": _global(module, name) + path + b"\x85R"
        for module, name in (
            *(("posix", "mkdir"), ("os", "makedirs"), ("builtins", "eval"), ("builtins", "exec")),
            *(("builtins", "__import__"), ("builtins", "getattr"), ("__builtin__", "open")),
            *(("functools", "partial"), ("operator", "attrgetter"), ("pickle", "loads")),
            *(("torch", "load"), ("torch.jit", "load"), ("torch.hub", "load")),
            *(("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_nested_tensor")),
            *(("torch.serialization", "os"), ("numpy.testing", "runstring"), ("omegaconf", "os")),
            *((metadata, "os"), (metadata, "field"), (metadata, "__builtins__")),
            *(("torch.distributed.checkpoint.filesystem", name) for name in ("os", "pickle", "io")),
            *(("collections", "abc"), ("pathlib", "os"), ("datetime", "sys"), ("torch", "nn")),
        )
    }
    built = {
        f"set the state of {module}.{name}": _attribute(_global(module, name))
        for module, name in (
            *(("os", "path"), ("torch.distributed.checkpoint.filesystem", "os"), (metadata, "os")),
            *(("collections", "OrderedDict"), ("torch", "Tensor"), (metadata, "Metadata")),
            *(("torch._utils", "_rebuild_tensor_v2"), ("torch", "float32"), ("torch", "Size")),
            *(("torch.storage", "UntypedStorage"), ("torch", "FloatStorage"), ("numpy", "ndarray")),
        )
    }
    return {
        **called,
        **built,
        "REDUCE by STACK_GLOBAL": _stack_global("posix", "mkdir") + path + b"\x85R",
        "a dotted name": _stack_global("torch.serialization", "os.mkdir") + path + b"\x85R",
        "INST": b"(" + path + b"iposix\nmkdir\n",
        "OBJ": b"(" + mkdir + path + b"o",
        "NEWOBJ": mkdir + path + b"\x85\x81",
        "NEWOBJ_EX": mkdir + path + b"\x85}\x92",
        "NEWOBJ_EX of a listed class": ordered + b")}" + _text("sn_hole") + b"K\x01s\x92",
        "EXT1": b"\x82" + bytes([CODE]) + path + b"\x85R",
        "EXT2": b"\x83" + CODE.to_bytes(2, "little") + path + b"\x85R",
        "EXT4": b"\x84" + CODE.to_bytes(4, "little") + path + b"\x85R",
        "a global in the memo": mkdir + b"q\x000h\x00" + path + b"\x85R",
        "a call of a call": ordered + b")R" + path + b"\x85R",
        "a call of a tensor": tensor + b")R)R",
        "a call of a dtype": _global("torch", "float32") + path + b"\x85R",
        "a call of a storage": _global("torch", "FloatStorage") + path + b"\x85R",
        "a call within a call": (
            _global("torch._tensor", "_rebuild_from_type_v2")
            + b"(" + mkdir + _global("torch", "Tensor") + path + b"\x85}tR"
        ),
        "an unknown subclass of a tensor": (
            _global("torch._tensor", "_rebuild_from_type_v2")
            + b"(" + ordered + mkdir + b")}tR"
        ),
        "reconstructor": (
            _global("copy_reg", "_reconstructor") + b"(" + mkdir + mkdir + path + b"tR"
        ),
        "a default factory": _global("collections", "defaultdict") + mkdir + b"\x85R",
        "SETITEM of a global": _global("os", "environ") + _text("sn_hole") + _text("1") + b"s",
        "SETITEM of a listed class": ordered + _text("sn_hole") + _text("1") + b"s",
        "APPEND to a global": _global("sys", "path") + _text("sn_hole") + b"a",
        "APPENDS to a constant": _global("torch", "float32") + b"(" + _text("sn_hole") + b"e",
        "ADDITEMS to a list": b"](" + _text("sn_hole") + b"\x90",
        "PERSID": b"Pmodule\n",
        "BINPERSID of a module": b"(" + _text("module") + mkdir + path + path + b"tQ",
        "BINPERSID of a text": _text("storage") + b"Q",
        "NEXT_BUFFER": b"\x97",
    }  # fmt: skip


def with_protocol(body: bytes) -> bytes:
    """Return a whole pickle of these instructions."""
    return b"\x80\x02" + body + b"."


def write_zip(path: Path, pickled: bytes) -> Path:
    """Write a file of torch.save with these bytes for its pickle."""
    path.write_bytes(_repacked(pickled))
    return path


def write_legacy(path: Path, pickled: bytes) -> Path:
    """Write a file as torch.save did before it wrote zip archives."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    start = b"".join(pickle.dumps(value, protocol=2) for value in head)
    path.write_bytes(start + pickled + pickle.dumps([], protocol=2))
    return path


def write_shards(folder: Path, pickled: bytes) -> Path:
    """Write one .bin shard and its index."""
    folder.mkdir()
    write_zip(folder / "pytorch_model-00001-of-00001.bin", pickled)
    index = {"weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def write_metadata(folder: Path, pickled: bytes) -> Path:
    """Write a folder of torch.distributed.checkpoint whose '.metadata' is hostile."""
    _save_distributed(folder)
    (folder / ".metadata").write_bytes(pickled)
    return folder


def write_value(folder: Path, pickled: bytes) -> Path:
    """Write one in which a value that is no tensor is hostile."""
    return _replace_part(folder, "epoch", _repacked(pickled))


def write_piece(folder: Path, pickled: bytes) -> Path:
    """Write one in which the piece of a tensor is hostile."""
    return _replace_part(folder, "w", _repacked(pickled))


FORMATS: dict[str, Callable[[Path, bytes], Path]] = {
    "zip": write_zip,
    "legacy": write_legacy,
    "shards": write_shards,
    "metadata": write_metadata,
    "value of a folder": write_value,
    "piece of a tensor": write_piece,
}


def _save_distributed(folder: Path) -> None:
    folder.mkdir()
    for name, content in _distributed().items():
        (folder / name).write_bytes(content)


@cache
def _distributed() -> dict[str, bytes]:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2), "epoch": 3}, checkpoint_id=folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _replace_part(folder: Path, name: str, content: bytes) -> Path:
    _save_distributed(folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            info.relative_path, info.offset, info.length = "hostile", 0, len(content)
    (folder / "hostile").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def _repacked(pickled: bytes) -> bytes:
    sound, made = io.BytesIO(), io.BytesIO()
    torch.save({}, sound)
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            is_pickle = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, pickled if is_pickle else content)
    return made.getvalue()
