"""Reading checkpoints: every format, no code run, and one clear message for other files."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_networks import Critic, prefixed, trained_critic
from safetensors.torch import save_file
from torch import Tensor

from sn_export.checkpoints import convert_checkpoint, read_checkpoint
from sn_export.checkpoints.safetensors_file import read_index
from sn_export.errors import CheckpointError


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def _save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _save_sharded(state: dict[str, Tensor], folder: Path) -> Path:
    names = list(state)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def _save_distributed(content: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder)
    return folder


def _write(form: str, state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / f"critic.{form}"
    if form == "zip":
        torch.save(state, path)
    elif form == "legacy":
        _save_legacy(state, path)
    elif form == "safetensors":
        save_file(state, path)
    elif form == "index":
        return _save_sharded(state, folder)
    elif form == "folder":
        return _save_sharded(state, folder).parent
    elif form == "numpy":
        with path.open("wb") as file:
            np.savez(file, **{name: value.numpy() for name, value in state.items()})
    else:
        return _save_distributed(dict(state), path)
    return path


KINDS = {
    **dict.fromkeys(("zip", "legacy"), "torch"),
    **dict.fromkeys(("safetensors", "index", "folder"), "safetensors"),
    **{"distributed": "distributed", "numpy": "numpy"},
}


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "numpy"])
@pytest.mark.parametrize("name", ["a", "a.pt", "a.bin", "a.npz", "a.safetensors"])
def test_the_first_bytes_say_what_a_file_is(name: str, form: str, tmp_path: Path) -> None:
    """Not its name, which people change."""
    path = _write(form, {"w": torch.ones(2, 3)}, tmp_path).rename(tmp_path / name)
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == KINDS[form]
    assert torch.equal(checkpoint.content["w"], torch.ones(2, 3))


@pytest.mark.parametrize("form", KINDS)
def test_every_format_gives_the_same_tensors(form: str, tmp_path: Path) -> None:
    """A state dict is the same bit for bit in every format."""
    state = Critic().state_dict()
    checkpoint = read_checkpoint(_write(form, state, tmp_path))
    (found,) = checkpoint.state_dicts()
    assert checkpoint.format == KINDS[form]
    assert set(found.tensors) == set(state)
    assert all(torch.equal(found.tensors[name], state[name]) for name in state)
    assert found.key == ""


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "generator", "params_ema", "a.b"]
)
def test_a_nested_state_dict_is_found_by_itself(key: str, tmp_path: Path) -> None:
    """A nested state dict is found, and the optimizer's state is not taken for one."""
    model = Critic()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    content: Any = model.state_dict()
    for part in reversed(key.split(".")):
        content = {part: content}
    content |= {"epoch": 3, "loss": torch.tensor(0.5), "optimizer": optimizer.state_dict()}
    content["optimizer_states"] = [optimizer.state_dict()]
    torch.save(content, tmp_path / "a.ckpt")
    (found,) = read_checkpoint(tmp_path / "a.ckpt").state_dicts()
    assert found.key == key


def test_a_distributed_checkpoint_keeps_its_nesting(tmp_path: Path) -> None:
    """A distributed checkpoint has its keys again, and plain values too."""
    path = _save_distributed({"model": Critic().state_dict(), "epoch": 3}, tmp_path / "dcp")
    checkpoint = read_checkpoint(path)
    assert checkpoint.content["epoch"] == 3
    assert [one.key for one in checkpoint.state_dicts()] == ["model"]


def test_versions_of_modules_come_along(tmp_path: Path) -> None:
    """The versions of modules are read, since old checkpoints depend on them."""
    torch.save({"state_dict": prefixed(Critic().state_dict(), "module.")}, tmp_path / "a.pt")
    (found,) = read_checkpoint(tmp_path / "a.pt").state_dicts()
    assert found.versions is not None
    assert found.versions["module.head"] == {"version": 1, "spectral_norm": {"weight.version": 1}}


@pytest.mark.parametrize("save", [torch.save, _save_legacy])
def test_a_pickle_that_would_run_code_is_refused(save: Any, tmp_path: Path) -> None:
    """A pickle runs nothing; the message says what it wanted, and how to allow it."""
    path, trace = tmp_path / "bad.pt", tmp_path / "trace"
    save({"state_dict": {"w": torch.ones(1)}, "x": Bomb(trace)}, path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"'{path}' wants to call 'posix.mkdir' while it is read, and nothing was run; "
        "--trust-pickle lets the file run any code as you, so use it only for files whose "
        "origin you trust"
    )
    assert not trace.exists()
    read_checkpoint(path, trust_pickle=True)
    assert trace.exists()


def test_a_distributed_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """A distributed checkpoint runs nothing, in '.metadata' or in values."""
    path, trace = _save_distributed({"w": torch.ones(1)}, tmp_path / "d"), tmp_path / "trace"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"folder '{path}' wants to call 'posix.mkdir' while it is read, and nothing was run; "
        "--trust-pickle lets the file run any code as you, so use it only for files whose "
        "origin you trust"
    )
    path = _save_distributed({"w": torch.ones(1), "x": Bomb(trace)}, tmp_path / "e")
    with pytest.raises(CheckpointError, match=r"^folder '.*' wants to call 'posix.mkdir' while"):
        read_checkpoint(path)
    assert not trace.exists()


def test_a_module_pickled_whole_is_read_where_it_is_trusted(tmp_path: Path) -> None:
    """A pickled module is refused by name, and with trust_pickle its state dict is read."""
    for is_zip in (False, True):
        torch.save({"net": Critic()}, tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(CheckpointError, match=r"wants to call 'cli_networks.Critic' while"):
            read_checkpoint(tmp_path / "whole.pt")
    (found,) = read_checkpoint(tmp_path / "whole.pt", trust_pickle=True).state_dicts()
    assert found.key == "net"
    assert "head.weight_orig" in found.tensors


def _message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path).choose(None, lambda one: True, "fits")
    return str(caught.value).replace(f"{path.parent}/", "")


def test_absent(tmp_path: Path) -> None:
    """A path that does not exist is refused."""
    assert _message(tmp_path / "no.pt") == "there is no checkpoint at 'no.pt'"


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.safetensors.index.json"])
def test_empty(name: str, tmp_path: Path) -> None:
    """An empty file is refused, whatever its name."""
    (tmp_path / name).touch()
    assert _message(tmp_path / name) == f"'{name}' is empty"


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated(form: str, share: float, tmp_path: Path) -> None:
    """A file of torch that is cut off anywhere is refused."""
    path = _write(form, Critic().state_dict(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    size = path.stat().st_size
    assert _message(path) == (
        f"'{path.name}' is damaged or truncated: torch cannot read its {size} bytes"
    )


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_truncated_safetensors(share: float, tmp_path: Path) -> None:
    """A safetensors file that is cut off in or after its header is refused."""
    path = _write("safetensors", Critic().state_dict(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    start = "'critic.safetensors' is damaged or truncated: safetensors cannot read it ("
    assert _message(path).startswith(start)


def test_garbage(tmp_path: Path) -> None:
    """A text file is refused by its first bytes."""
    (tmp_path / "a.pt").write_text("<!DOCTYPE html> not found")
    assert _message(tmp_path / "a.pt") == (
        "'a.pt' is no checkpoint: it starts with b'<!DOCTYP', which is neither torch's format "
        "nor safetensors"
    )


def test_no_state_dict_in_it(tmp_path: Path) -> None:
    """For a checkpoint without a state dict the message says what it holds."""
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pt")
    assert _message(tmp_path / "a.pt") == "'a.pt' holds no state dict: its keys are 'epoch', 'lr'"
    torch.save([1], tmp_path / "b.pt")
    assert _message(tmp_path / "b.pt") == (
        "'b.pt' holds no state dict: it holds a value of type 'list'"
    )


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    """For a folder that is no checkpoint the message says which files make one."""
    (tmp_path / "f").mkdir()
    assert _message(tmp_path / "f") == (
        "folder 'f' is no checkpoint: it holds neither the '.metadata' of "
        "torch.distributed.checkpoint nor one '*.safetensors.index.json', '*.bin.index.json' or "
        "file of weights"
    )


def test_a_damaged_distributed_checkpoint(tmp_path: Path) -> None:
    """A distributed folder that lacks a file is refused, and the file is named."""
    path = _save_distributed(Critic().state_dict(), tmp_path / "d")
    (path / "__0_0.distcp").unlink()
    assert _message(path) == "folder 'd' is damaged or incomplete: '__0_0.distcp' is absent"


def test_indexes_that_lie(tmp_path: Path) -> None:
    """An index without a map, with an absent shard, or with a tensor in no shard is refused."""
    for kind, name in {
        ".bin": "m.bin.index.json",
        "safetensors": "m.safetensors.index.json",
    }.items():
        index = tmp_path / name
        index.write_text("[1]")
        assert _message(index) == (
            f"'{name}' is no index of {kind} shards: it holds no 'weight_map'"
        )
        index.unlink()
        with pytest.raises(CheckpointError, match=r"^cannot read .*: No such file or directory$"):
            read_index(index)  # gone since it was found
    index.write_text('{"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}')
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    assert _message(index) == (
        "'m.safetensors.index.json' lists shards that are absent: 'b.safetensors'"
    )
    long = "b" * 300
    index.write_text(f'{{"weight_map": {{"w": "{long}"}}}}')
    assert _message(index) == f"'m.safetensors.index.json' lists shards that are absent: '{long}'"
    index.write_text('{"weight_map": {"y": "a.safetensors"}}')
    assert _message(index) == "'a.safetensors' lacks 'y', which its index promises"


def test_several_state_dicts_are_chosen_by_key(tmp_path: Path) -> None:
    """If several state dicts fit, the message lists the keys; so it does for an unknown key."""
    state = Critic().state_dict()
    torch.save({"params": state, "params_ema": state}, tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert _message(tmp_path / "a.pt") == (
        "'a.pt' holds 2 state dicts, each of which fits; choose with --key one of 'params' (20 "
        "tensors), 'params_ema' (20 tensors)"
    )
    assert checkpoint.choose("params_ema", lambda one: True, "").key == "params_ema"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.choose("ema", lambda one: True, "")
    assert str(caught.value) == (
        f"'{tmp_path}/a.pt' holds no state dict under 'ema'; it holds one under 'params' "
        "(20 tensors), 'params_ema' (20 tensors)"
    )


def test_arrays_of_numpy(tmp_path: Path) -> None:
    """An .npz is read as a state dict, whatever the byte order of its arrays."""
    state = {name: value.numpy() for name, value in trained_critic().state_dict().items()}
    state["head.weight_orig"] = state["head.weight_orig"].astype(">f4")
    np.savez(tmp_path / "a.npz", **state)
    convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.pt", "plain")
    plain = Critic("plain").eval()
    plain.load_state_dict(torch.load(tmp_path / "b.pt"))
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(images), trained_critic()(images))
