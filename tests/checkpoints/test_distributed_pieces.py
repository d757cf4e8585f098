"""Tensors in pieces: every element is in one piece in the folder, or the file at fault is named."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_networks import ALONE, Critic, save_folder, trained_critic
from fingerprint import same_bits
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from sn_export.checkpoints import convert_checkpoint, read_checkpoint
from sn_export.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _folder(path: Path, edit: Callable[[Any, Any], Any]) -> Path:
    """Write a folder with the tensor 'w' [4, 2], and let ``edit`` change its records."""
    save_folder({"w": torch.arange(8.0).reshape(4, 2)}, path)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (info,) = metadata.storage_data.values()
    edit(metadata, info)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def _resize(metadata: Any, rows: int) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size([rows, 2])


def _add_piece(metadata: Any, info: Any) -> None:
    index, place = next(iter(metadata.storage_data.items()))
    piece = ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([4, 2]))
    metadata.state_dict_metadata["w"].chunks.append(piece)
    metadata.storage_data[dataclasses.replace(index, offset=torch.Size([3, 0]))] = place
    _resize(metadata, 7)


def _entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["w"]


def _add_twin(metadata: Any) -> None:
    """Add a second name for the piece of 'w', and for its place in what was saved."""
    metadata.state_dict_metadata["twin"] = _entry(metadata)
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[dataclasses.replace(index, fqn="twin")] = place
    metadata.planner_data["twin"] = metadata.planner_data["w"]


FAULTS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "not covered": (
        lambda metadata, info: _resize(metadata, 5),
        "the pieces of 'w' hold 8 of its 10 elements",
    ),
    "no piece": (
        lambda metadata, info: metadata.state_dict_metadata["w"].chunks.clear(),
        "the pieces of 'w' hold 0 of its 8 elements",
    ),
    "too small": (
        lambda metadata, info: _resize(metadata, 3),
        "a piece of 'w' ends outside of its shape [3, 2]",
    ),
    "overlap": (_add_piece, "pieces of 'w' overlap"),
    "outside": (
        lambda metadata, info: setattr(info, "relative_path", "../outside.bin"),
        "'../outside.bin' is not inside of it",
    ),
    "absolute": (
        lambda metadata, info: setattr(info, "relative_path", "/etc/passwd"),
        "'/etc/passwd' is not inside of it",
    ),
    "no path": (
        lambda metadata, info: setattr(info, "relative_path", "a\0b"),
        "'a\\x00b' is no path",
    ),
    "no text": (
        lambda metadata, info: metadata.state_dict_metadata.update({3: _entry(metadata)}),
        "it names something by no text",
    ),
    "no tensor": (
        lambda metadata, info: metadata.state_dict_metadata.update(w=3),
        "'w' is neither a tensor nor bytes",
    ),
    "no shape": (
        lambda metadata, info: setattr(_entry(metadata), "size", None),
        "'w' has no dtype, shape or pieces",
    ),
    "a piece without a place": (
        lambda metadata, info: setattr(_entry(metadata).chunks[0], "offsets", torch.Size([0])),
        "a piece of 'w' has no place",
    ),
    "another dtype": (
        lambda metadata, info: setattr(_entry(metadata).properties, "dtype", torch.int32),
        "a piece of 'w' is not what it should be",
    ),
    "two in one place": (
        lambda metadata, info: _add_twin(metadata),
        "'twin' is where another value is",
    ),
    "within another": (
        lambda metadata, info: (
            _add_twin(metadata),
            metadata.planner_data.update(twin=("w", "x")),
        ),
        "'twin' is where another value is",
    ),
    "no list of keys": (
        lambda metadata, info: metadata.planner_data.update(w=3),
        "the place of 'w' is no list of keys",
    ),
    "absent": (
        lambda metadata, info: setattr(info, "relative_path", "__1_0.distcp"),
        "'__1_0.distcp' is absent",
    ),
    "no place": (
        lambda metadata, info: metadata.storage_data.clear(),
        "it does not say where 'w' is",
    ),
    "negative": (
        lambda metadata, info: setattr(info, "offset", -1),
        "it does not say where 'w' is",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_records_that_lie(fault: str, tmp_path: Path) -> None:
    """Records with a gap, an overlap or a foreign path are refused, and no other file is opened."""
    edit, reason = FAULTS[fault]
    (tmp_path / "outside.bin").write_bytes(bytes(10_000))
    path = _folder(tmp_path / "d", edit)
    with pytest.raises(CheckpointError) as caught:
        dict(read_checkpoint(path).content)
    assert str(caught.value) == f"folder '{path}' is damaged or incomplete: {reason}"


def test_pieces_that_are_no_values(tmp_path: Path) -> None:
    """A piece that is a sparse tensor, or compressed by an extension, is refused."""
    sparse = io.BytesIO()
    torch.save(torch.eye(4, 2).to_sparse(), sparse)

    def replace(metadata: Any, info: Any) -> None:
        (tmp_path / "a" / info.relative_path).write_bytes(sparse.getvalue())
        info.length = len(sparse.getvalue())

    def compress(metadata: Any, info: Any) -> None:
        info.transform_descriptors = ["zstd"]

    with pytest.raises(CheckpointError, match=r"incomplete: a piece of 'w' holds no values$"):
        dict(read_checkpoint(_folder(tmp_path / "a", replace)).content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(_folder(tmp_path / "b", compress))
    assert str(caught.value).endswith(
        " holds 'w' compressed by an extension, which is not supported; save it without"
    )


def test_records_of_another_torch(tmp_path: Path) -> None:
    """Fields of the records that an older torch lacks do not make it call the folder damaged."""

    def renew(metadata: Any, info: Any) -> None:
        metadata.version, metadata.storage_meta.modules = "1.0.0", []
        info.transform_descriptors = None

    content = read_checkpoint(_folder(tmp_path / "a", renew)).content
    assert content["w"].shape == (4, 2)


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    """A file that is empty or shorter than the records say is named."""
    path = _folder(tmp_path / "d", lambda metadata, info: None)
    file = path / "__0_0.distcp"
    whole = file.read_bytes()
    start = f"folder '{path}' is damaged or incomplete: '__0_0.distcp'"
    file.write_bytes(whole[:100])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    end = len(whole)
    assert str(caught.value) == f"{start} has 100 bytes, and 'w' should end at {end}"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{start} is empty"


def _save_rank(folder: Path, rank: int, tensor: torch.Tensor, start: list[int]) -> Path:
    path = folder / f"shard-0000{rank}-model-00001-of-00001.safetensors"
    info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": start}})}
    save_file({"w": tensor}, path, info)
    return path


def test_safetensors_of_several_ranks(tmp_path: Path) -> None:
    """A folder of several ranks is read; a single file of it is refused, and so is a gap."""
    whole = torch.arange(66.0).reshape(33, 2)
    first = _save_rank(tmp_path, 1, whole[:17].clone(), [0, 0])
    _save_rank(tmp_path, 2, whole[17:].clone(), [17, 0])
    (found,) = read_checkpoint(tmp_path).state_dicts()
    assert torch.equal(found.tensors["w"], whole)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(first)
    assert str(caught.value) == (
        f"'{first}' is one rank's part of a checkpoint, and its tensors may be pieces; give its "
        f"folder '{tmp_path}' instead"
    )
    first.unlink()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"folder '{tmp_path}' is damaged or incomplete: the pieces of 'w' hold 32 of its 66 "
        "elements"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_from_a_folder(tmp_path: Path) -> None:
    """Torch's own loader reads the converted folder, with everything else as it was."""
    model = trained_critic()
    content = {
        "model": model.state_dict(),
        "ema": {"decay": 0.5, "shadow": torch.ones(3)},
        "sizes": [torch.zeros(0), torch.tensor(4)],
        "nets": [{"a": torch.ones(2), "rate": 0.1}],
        "step": 7,
    }
    save_folder(content, tmp_path / "a")
    made = convert_checkpoint(tmp_path / "a", tmp_path / "b", "plain")
    assert made.files == (tmp_path / "b",)
    plain = Critic("plain")
    wanted = content | {"model": plain.state_dict()}
    loaded: Any = {
        "model": plain.state_dict(),
        "ema": {"decay": 0.0, "shadow": torch.zeros(3)},
        "sizes": [torch.ones(0), torch.tensor(0)],
        "nets": [{"a": torch.zeros(2), "rate": 0.0}],
        "step": 0,
    }
    dcp.load(loaded, checkpoint_id=tmp_path / "b", **ALONE)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain.eval()(images), model(images))
    assert str({**loaded, "model": 0}) == str({**wanted, "model": 0})
    convert_checkpoint(tmp_path / "a", tmp_path / "only", "plain", weights_only=True)
    assert set(read_checkpoint(tmp_path / "only").content) == set(plain.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_keeps_every_dtype(tmp_path: Path) -> None:
    """What is written again is read again, bit for bit, whatever dtype torch takes by default."""
    dtypes = (torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool)
    others = {str(dtype): torch.tensor([1, 0, 1]).to(dtype) for dtype in dtypes}
    critic = trained_critic().to(torch.bfloat16).state_dict()
    save_folder({"net": dict(critic) | others}, tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "hook")
    before, after = (read_checkpoint(tmp_path / name).content["net"] for name in "ab")
    assert dict(after.specs) == dict(before.specs)
    assert all(same_bits(after[name], before[name]) for name in before)


def test_a_folder_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Nothing of where and when it was written is in a converted folder."""
    save_folder({"net": dict(trained_critic().state_dict())}, tmp_path / "a")
    for name in "bc":
        convert_checkpoint(tmp_path / "a", tmp_path / name, "plain")
    found = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "bc"]
    assert found[0] == found[1]
    assert not any(str(tmp_path).encode() in content for content in found[0].values())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """No folder is made over another one, from a file, or with a weight that fails."""
    save_folder(dict(trained_critic().state_dict()), tmp_path / "a")
    zero = {name: torch.zeros_like(value) for name, value in trained_critic().state_dict().items()}
    save_folder(zero, tmp_path / "zero")
    torch.save(zero, tmp_path / "a.pt")
    before = sorted(tmp_path.rglob("*"))
    for source, target, message in (
        ("a", "zero", "cannot write 'zero': it is there, and no empty folder"),
        ("zero", "b", "sigma of 'body.0.weight' is 0 or too small to divide by"),
        ("a.pt", "b", "cannot write 'b': it must end in .pt, .pth, .ckpt, .bin or .safetensors"),
    ):
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(tmp_path / source, tmp_path / target, "plain", dims={})
        assert str(caught.value).replace(f"{tmp_path}/", "").startswith(message)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_safetensors_from_one(tmp_path: Path) -> None:
    """A converted folder of safetensors has one file, with the name of Hugging Face."""
    (tmp_path / "a").mkdir()
    save_file(trained_critic().state_dict(), tmp_path / "a" / "model.safetensors")
    (tmp_path / "b").mkdir()  # an empty one is as good as none
    made = convert_checkpoint(tmp_path / "a", tmp_path / "b", "plain")
    assert made.files == (tmp_path / "b",)
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == set(Critic("plain").state_dict())
