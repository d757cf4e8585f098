"""Tensors in pieces: all of them are there, once, in the folder; or the file at fault is named."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from sn_export.checkpoints import read_checkpoint
from sn_export.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _folder(path: Path, edit: Callable[[Any, Any], None]) -> Path:
    """Write a folder with the tensor 'w' [4, 2], and let ``edit`` change its records."""
    dcp.save({"w": torch.arange(8.0).reshape(4, 2)}, checkpoint_id=path, no_dist=True)
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


FAULTS: dict[str, tuple[Callable[[Any, Any], None], str]] = {
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
    """Nothing is taken for a weight that no piece holds, and no file outside is opened."""
    edit, reason = FAULTS[fault]
    (tmp_path / "outside.bin").write_bytes(bytes(10_000))
    path = _folder(tmp_path / "d", edit)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"folder '{path}' is damaged or incomplete: {reason}"


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    """Empty, or shorter than the records say: the file is named."""
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
    """Their folder is the checkpoint; one of them is refused, and so is a folder with a gap."""
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
