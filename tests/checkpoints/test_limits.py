"""Files that ask for more than they hold end in one message, quickly and in bounded memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_networks import save_folder, trained_critic
from hostile_pickles import FORMATS
from safetensors.torch import save_file

from sn_export.checkpoints import convert_checkpoint, inspect_checkpoint, read_checkpoint
from sn_export.errors import CheckpointError


def _message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(path)
    return str(caught.value).replace(f"{path.parent}/", "")


def _write_safetensors(path: Path, header: Any, content: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin.index.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    """A pipe is refused, since opening it would wait for a writer."""
    os.mkfifo(tmp_path / name)
    assert _message(tmp_path / name) == f"cannot read '{name}': it is no regular file"


def test_a_device_is_not_read() -> None:
    """A device is refused, since it has no end."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint("/dev/zero")
    assert str(caught.value) == "cannot read '/dev/zero': it is no regular file"


def test_pipes_in_folders(tmp_path: Path) -> None:
    """A pipe is refused as a shard, a file of weights, '.metadata', or a piece of a folder."""
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    os.mkfifo(tmp_path / "a.safetensors")
    assert _message(index) == (
        "'m.safetensors.index.json' lists what is no regular file: 'a.safetensors'"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (".metadata", "model.safetensors", "pytorch_model.bin"):
        os.mkfifo(folder / name)
    assert _message(folder).startswith("folder 'folder' is no checkpoint: it holds neither")
    path = FORMATS["value of a folder"](tmp_path / "dcp", pickle.dumps(3))
    (path / "hostile").unlink()
    os.mkfifo(path / "hostile")
    assert _message(path) == ("folder 'dcp' is damaged or incomplete: 'hostile' is no regular file")


def test_shared_dictionaries_are_walked_once(tmp_path: Path) -> None:
    """A dictionary under 13 million paths is searched once."""
    node: Any = {"x": 1}
    for _ in range(5):
        node = {f"k{i}": node for i in range(60)}
    torch.save(node, tmp_path / "a.pt")
    assert _message(tmp_path / "a.pt").startswith("'a.pt' holds no state dict: its keys are 'k0'")


def test_shared_state_dicts_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    """Of a state dict under millions of paths the first hundred are listed."""
    node: Any = {"w": torch.ones(1)}
    for _ in range(5):
        node = {f"k{i}": node for i in range(60)}
    torch.save(node, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert len(found.state_dicts()) == 100
    chosen = found.choose("k59.k58.k57.k56.k55", lambda one: False, "fits")
    assert chosen.key == "k59.k58.k57.k56.k55"


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_content_that_holds_itself(kind: str, tmp_path: Path) -> None:
    """A list or dictionary that holds itself is searched once."""
    inner: Any = {"w": torch.ones(1)}
    node: Any = {"net": inner}
    node["self"] = node if kind == "dict" else [node]
    torch.save(node, tmp_path / "a.pt")
    assert "net" in [one.key for one in read_checkpoint(tmp_path / "a.pt").state_dicts()]


def test_tuples_that_take_years_to_hash(tmp_path: Path) -> None:
    """Sixty tuples, each twice in the next, are refused as a key."""
    nested = b")" + b"".join(b"2\x86" for _ in range(60))
    path = FORMATS["zip"](tmp_path / "a.pt", b"\x80\x02}" + nested + b"K\x01s.")
    assert _message(path) == "'a.pt' is damaged: it holds a value of type 'tuple' as a key"


@pytest.mark.parametrize("depth", [500, 100_000])
def test_nested_too_deeply(depth: int, tmp_path: Path) -> None:
    """A pickle or JSON of deeply nested lists ends in one message."""
    path = FORMATS["zip"](tmp_path / "a.pt", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    assert _message(path) == "'a.pt' holds no state dict: it holds a value of type 'list'"
    index = tmp_path / "a.safetensors.index.json"
    index.write_text("[" * depth)
    assert _message(index) == (
        "'a.safetensors.index.json' is no index of safetensors shards: it holds no 'weight_map'"
    )
    path = _write_safetensors(tmp_path / "a.safetensors", b"[" * depth)
    assert _message(path).startswith("'a.safetensors' is damaged or truncated: safetensors cannot")


def test_a_storage_that_is_expanded(tmp_path: Path) -> None:
    """One element does not become a tensor of 4 TB; usual expanded tensors are read."""
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    assert _message(tmp_path / "a.pt") == (
        "'a.pt' is damaged: it holds a tensor of shape [1000000, 1000000] whose storage holds 1 "
        "element"
    )
    torch.save({"w": torch.ones(1).expand(1000, 1000)}, tmp_path / "b.pt")
    assert inspect_checkpoint(tmp_path / "b.pt").tensors == 1


def test_more_dimensions_than_torch_computes_with(tmp_path: Path) -> None:
    """A tensor with too many dimensions is refused, of torch and of safetensors."""
    torch.save({"w": torch.ones(1)[(None,) * 64]}, tmp_path / "a.pt")
    assert _message(tmp_path / "a.pt") == (
        "'a.pt' is damaged: it holds a tensor whose shape is no list of sizes"
    )
    spec = {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}
    path = _write_safetensors(tmp_path / "a.safetensors", {"w": spec}, bytes(4))
    assert _message(path) == ("'a.safetensors': 'w' has 65 dimensions, and torch knows at most 64")


@pytest.mark.parametrize(("code", "count"), [("F4", 2), ("F6_E2M3", 4), ("X", 1)])
def test_dtypes_of_safetensors_that_are_not_supported(
    code: str, count: int, tmp_path: Path
) -> None:
    """An unsupported dtype of safetensors is named with its tensor."""
    size = {"F4": 1, "F6_E2M3": 3}.get(code, 1)
    spec = {"dtype": code, "shape": [count], "data_offsets": [0, size]}
    path = _write_safetensors(tmp_path / "a.safetensors", {"w": spec}, bytes(size))
    message = _message(path)
    assert message.startswith("'a.safetensors'")
    assert code in message


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".bin"])
def test_archives_that_unpack_to_more(suffix: str, tmp_path: Path) -> None:
    """An archive of a few kilobytes does not unpack to gigabytes."""
    sound = io.BytesIO()
    torch.save({"w": torch.zeros(2**20)}, sound)
    path = tmp_path / f"a{suffix}"
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in source.namelist():
            made.writestr(name, source.read(name))
    assert _message(path) == (
        f"'a{suffix}' holds 'archive/data.pkl' compressed, which torch.save never does; save it "
        "again with torch.save"
    )


def test_storages_larger_than_their_file(tmp_path: Path) -> None:
    """A legacy file that asks for a terabyte is refused before memory is taken."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"\x8a\x06\x00\x00\x00\x00\x00\x01NtQ"
    )
    for form in ("legacy", "zip"):
        body = storage if form == "legacy" else storage.replace(b"NtQ", b"tQ")
        path = FORMATS[form](tmp_path / form, b"\x80\x02" + body + b".")
        size = path.stat().st_size
        assert _message(path) == (
            f"'{form}' is damaged or truncated: torch cannot read its {size} bytes"
        )


def test_many_keys(tmp_path: Path) -> None:
    """Tens of thousands of small tensors are listed."""
    state = {f"layers.{i}.weight": torch.ones(1) for i in range(30_000)}
    save_file(state, tmp_path / "a.safetensors")
    assert inspect_checkpoint(tmp_path / "a.safetensors").tensors == 30_000


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_is_converted_one_tensor_at_a_time(tmp_path: Path) -> None:
    """From a distributed folder to safetensors one tensor at a time is in memory."""
    state = {f"w{i}": torch.full((2**20,), float(i)) for i in range(40)}  # 160 MB
    state |= trained_critic().state_dict()
    save_folder({"model": state}, tmp_path / "dcp")
    del state
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "made").mkdir()
    convert_checkpoint(tmp_path / "dcp", tmp_path / "made" / "a.safetensors", "plain")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024  # kilobytes
    tensors = read_checkpoint(tmp_path / "made" / "a.safetensors").state_dicts()[0].tensors
    assert all(torch.equal(tensors[f"w{i}"], torch.full((2**20,), float(i))) for i in (0, 39))


def _nest(times: int, hold: Callable[[Any], Any]) -> Any:
    value: Any = [1]
    for _ in range(times):
        value = hold(value)
    return value


def _in_itself() -> list[Any]:
    value: list[Any] = []
    value.append({"value": value})
    return value


@pytest.mark.parametrize("place", ["beside", "within"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _nest(60, lambda value: [value, value]), "in each other too many times"),
        (
            lambda: _nest(40, lambda value: {"a": value, 1: (value,)}),
            "in each other too many times",
        ),
        (lambda: _nest(150, lambda value: [value]), "more than 100 levels deep"),
        (_in_itself, "in themselves"),
    ],
    ids=["lists", "dictionaries", "deep", "in itself"],
)
def test_nesting_that_nobody_could_write(
    make: Callable[[], Any], message: str, place: str, tmp_path: Path
) -> None:
    """Values in values, by a billion ways, a hundred deep or in themselves, are refused at once."""
    vectors = {"weight_u": torch.ones(3), "weight_v": torch.ones(2)}
    content: dict[str, Any] = {"weight_orig": torch.eye(3, 2), **vectors}
    content |= {"_extra_state": make()} if place == "within" else {}
    torch.save({"net": content} | ({"rest": make()} if place == "beside" else {}), tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"holds values that lie {message}, which cannot be"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b.pt", "plain")
    assert os.listdir(tmp_path) == ["a"]


def test_a_number_that_is_too_long_a_key(tmp_path: Path) -> None:
    """A number whose digits nobody could write is no key, and the message names the file."""
    torch.save({"net": {"w": torch.ones(2)}, 10**5000: 1}, tmp_path / "a.pt")
    assert _message(tmp_path / "a.pt") == (
        "'a.pt' is damaged: it holds a number of more than 1024 bits as a key"
    )
