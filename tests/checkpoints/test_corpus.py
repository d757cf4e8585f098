"""Checkpoints as people have them: formats, spellings, nestings, prefixes and dtypes."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pickle
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_networks import Critic, Kind, prefixed, save_folder, trained_critic
from hostile_pickles import FORMATS as FILES
from safetensors.torch import save_file
from torch import nn

from sn_export.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from sn_export.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NESTINGS: dict[str, Callable[[Any], Any]] = {
    "": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "a.b": lambda state: {"a": {"b": state}, "optimizer": {"param_groups": [], "state": {}}},
    "models.1": lambda state: {"models": [{}, state]},
}
FORMATS = ["zip", "legacy", "protocol 4", "safetensors", "shards", "distributed"]
FLAT = ("safetensors", "shards")  # which do not nest
PLACES = [(form, key) for form in FORMATS for key in NESTINGS if not (key and form in FLAT)]


def _write(form: str, content: Any, folder: Path) -> Path:
    path = folder / "critic"
    if form == "safetensors":
        save_file(content, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if form == "distributed":
        save_folder(content, path)
    elif form == "shards":
        path.mkdir()
        names = list(content)
        files = {"m-1.bin": names[::2], "m-2.bin": names[1::2]}
        for file, keys in files.items():
            torch.save({key: content[key] for key in keys}, path / file)
        weights = {key: file for file, keys in files.items() for key in keys}
        (path / "m.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    else:
        torch.save(
            content,
            path,
            pickle_protocol=4 if form == "protocol 4" else 2,
            _use_new_zipfile_serialization=form != "legacy",
        )
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "module.", "critic."])
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@pytest.mark.parametrize(("form", "nesting"), PLACES)
def test_it_loads_as_what_was_saved(
    form: str, kind: Kind, nesting: str, prefix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A network of the same spelling loads the state dict bit for bit, wherever it is."""
    model = trained_critic(kind).to(dtype)
    state = model.state_dict()
    content = NESTINGS[nesting](prefixed(dict(state), prefix))
    target = Critic(kind).to(dtype)
    loaded = load_checkpoint(target, read_checkpoint(_write(form, content, tmp_path)))
    assert loaded.key == nesting
    after = target.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def _surroundings() -> dict[str, Any]:
    return {
        "scalar": np.float64(0.5),
        "array": np.arange(3),
        "args": argparse.Namespace(lr=0.1, betas=(0.5, 0.9)),
        "path": Path("run"),
        "when": datetime.datetime(2026, 1, 2),
        "deque": collections.deque([1.0], maxlen=3),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "size": torch.Size([1, 2]),
        "set": {1, 2},
        "config": types.SimpleNamespace(a=1),
        "named": [torch.optim.SGD, nn.functional.relu, int],  # and not called
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4", "distributed"])
def test_harmless_values_are_left_unread(form: str, tmp_path: Path) -> None:
    """The weights load, a note names the other values, and nothing of these is imported."""
    state = trained_critic().state_dict()
    path = _write(form, {"model": dict(state), **_surroundings()}, tmp_path)
    checkpoint = read_checkpoint(path)
    (note,) = checkpoint.notes
    assert note.startswith("left unread: 'argparse.Namespace', 'datetime.datetime', ")
    assert load_checkpoint(Critic(), checkpoint).key == "model"
    assert note in inspect_checkpoint(path).notes
    assert checkpoint.content["counter"] == {"a": 2, "b": 1}
    assert checkpoint.content["deque"] == collections.deque([1.0])
    with pytest.raises(CheckpointError, match=r"also holds '.*', which was left unread"):
        convert_checkpoint(path, tmp_path / "b.pt", "plain")
    convert_checkpoint(path, tmp_path / "b.pt", "plain", weights_only=True)


def test_the_classes_of_omegaconf_are_not_imported(tmp_path: Path) -> None:
    """A configuration whose package is absent is left unread."""
    config = b"comegaconf.dictconfig\nDictConfig\n)\x81}X\x01\x00\x00\x00aK\x01sb"
    path = FILES["zip"](tmp_path / "a.pt", b"\x80\x02}X\x01\x00\x00\x00c" + config + b"s.")
    assert read_checkpoint(path).notes == (
        "left unread: 'omegaconf.dictconfig.DictConfig', which weights do not need; "
        "--trust-pickle reads them, and lets the file run any code as you",
    )


def _message(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    return str(caught.value).replace(f"{path.parent}/", "")


def _write_zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def _write_array(path: Path, save: Callable[..., None], value: object) -> None:
    with path.open("wb") as file:
        save(file, np.array(value))


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "npz": (
        lambda path: _write_array(path, np.savez, [None]),
        "no .npz of numeric arrays: Object arrays cannot be loaded when allow_pickle=False",
    ),
    "npy": (
        lambda path: _write_array(path, np.save, [1.0]),
        "a numpy array, not a checkpoint of torch",
    ),
    "pt2": (
        lambda path: _write_zip(path, "c/models/model.json", "c/archive_format"),
        "a program of torch.export (.pt2), not a checkpoint; torch.save the state_dict of what "
        "torch.export.load returns",
    ),
    "pt2 of torch 2.1, in a folder of a folder": (
        lambda path: _write_zip(path, "a/b/serialized_exported_program.json"),
        "a program of torch.export (.pt2), not a checkpoint; torch.save the state_dict of what "
        "torch.export.load returns",
    ),
    "package": (
        lambda path: _write_zip(path, "c/.data/extern_modules"),
        "a torch.package, which holds code; torch.save the state dict of what is in it",
    ),
    "zip": (
        lambda path: _write_zip(path, "a.txt", "b.txt"),
        "a zip archive of something else than a checkpoint: it holds 'a.txt', 'b.txt'",
    ),
    "empty zip": (lambda path: _write_zip(path), "an empty zip archive"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"w": torch.ones(2)})),
        "a plain pickle, not a file of torch.save: load it where it comes from, and torch.save "
        "the state dict in it; --trust-pickle reads it, and lets it run any code as you",
    ),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of Git LFS; fetch the file itself with git lfs pull",
    ),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n"), "an HDF5 file, as Keras writes it"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03"), "a GGUF file of llama.cpp"),
    "gzip": (
        lambda path: path.write_bytes(b"\x1f\x8b\x08"),
        "a gzip archive; unpack it first",
    ),
    "zstd": (
        lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd\x04"),
        "a zstd archive; unpack it first",
    ),
    "7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c"), "a 7z archive; unpack it first"),
    "onnx": (
        lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch"),
        "an ONNX file, which holds a graph; give the checkpoint that it was made from",
    ),
    "script": (
        lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "a TorchScript archive, which holds code; save the state dict instead, or let it run with "
        "--trust-pickle if you trust its origin",
    ),
}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_sound_files_of_another_kind(kind: str, name: str, tmp_path: Path) -> None:
    """The message for a sound file of another kind names the kind, and what to do."""
    write, what = OTHERS[kind]
    write(tmp_path / name)
    assert _message(tmp_path / name) == f"'{name}' is {what}"


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_another_kind(suffix: str, has_index: bool, tmp_path: Path) -> None:
    """A shard that was cloned without Git LFS is called that, not damaged."""
    write, what = OTHERS["lfs"]
    write(tmp_path / f"model.{suffix}")
    if has_index:
        index = {"weight_map": {"w": f"model.{suffix}"}}
        (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps(index))
    assert _message(tmp_path).endswith(f"/model.{suffix}' is {what}")


@pytest.mark.parametrize("kind", ["script", "pickle", "whole module"])
def test_what_trust_reads(kind: str, tmp_path: Path) -> None:
    """With trust_pickle the state dicts of whole modules and archives are read."""
    if kind == "whole module":
        torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    else:
        OTHERS[kind][0](tmp_path / "a.pt")
    (found,) = read_checkpoint(tmp_path / "a.pt", trust_pickle=True).state_dicts()
    assert "w" in found.tensors or "weight" in found.tensors


@pytest.mark.parametrize(
    ("kind", "content"),
    [("script", {"c/constants.pkl": b"x"}), ("pickle", b"\x80\x02}X\x01\x00\x00\x00wK")],
)
def test_what_trust_cannot_read(kind: str, content: Any, tmp_path: Path) -> None:
    """A damaged file is said to be one, with its size, whatever it was."""
    path = tmp_path / "a.pt"
    if kind == "script":
        _write_zip(path, *content)
    else:
        path.write_bytes(content + bytes(20))
    size = path.stat().st_size
    assert _message(path, trust_pickle=True) == (
        f"'a.pt' is damaged or truncated: torch cannot read its {size} bytes"
    )


def test_an_onnx_file_by_its_name(tmp_path: Path) -> None:
    """An ONNX file with unusual first bytes is recognised by its name."""
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08\x08\x3a\x00")
    assert _message(path).startswith("'a.onnx' is an ONNX file, which holds a graph; give the ")


def test_the_first_format_of_torch(tmp_path: Path) -> None:
    """Torch's first format is refused, as torch would unpack it to disk."""
    name = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".decode("latin-1")
    with tarfile.open(
        tmp_path / "a.pt", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as archive:
        archive.addfile(tarfile.TarInfo(name))
    assert _message(tmp_path / "a.pt") == (
        "'a.pt' is a tar archive, as torch.save wrote before 0.1.10; torch.load and torch.save it "
        "again where it comes from"
    )


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "other.safetensors"],
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
        ["pytorch_model.bin", "training_args.bin"],
        ["adapter_model.safetensors", "other.safetensors"],
        ["adapter_model.bin", "training_args.bin"],
        ["diffusion_pytorch_model.bin", "training_args.bin"],
        *([f"any{suffix}"] for suffix in (".bin", ".pt", ".pth", ".ckpt")),
    ],
)
def test_folders_with_one_file_of_weights(names: list[str], tmp_path: Path) -> None:
    """A folder with one file of weights is read, whatever else it holds."""
    state = {"w": torch.ones(2)}
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        if name.endswith(".safetensors"):
            save_file(state, tmp_path / name)
        else:
            torch.save(state, tmp_path / name)
    (found,) = read_checkpoint(tmp_path).state_dicts()
    assert list(found.tensors) == ["w"]


def test_folders_with_several(tmp_path: Path) -> None:
    """A folder with several files of weights is refused, and the message names them."""
    for first, second in (
        ("a.pt", "b.pt"),
        ("pytorch_model.bin", "pytorch_model_1.bin"),
        ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ):
        folder = tmp_path / first
        folder.mkdir()
        for name in (first, second, "optimizer.bin")[: 2 + first.endswith(".bin")]:
            torch.save({}, folder / name)
        advice = "; where ZeRO of DeepSpeed split the weights, its zero_to_fp32.py joins them"
        assert _message(folder) == (
            f"folder '{first}' holds several checkpoints; give one of '{first}', '{second}'"
            + advice * first.startswith("mp_rank")
        )


def test_a_shard_that_lacks_a_tensor(tmp_path: Path) -> None:
    """A .bin shard that lacks a tensor of its index is named."""
    torch.save({"w": torch.ones(1)}, tmp_path / "a.bin")
    index = tmp_path / "m.bin.index.json"
    index.write_text('{"weight_map": {"x": "a.bin"}}')
    assert _message(index) == "'a.bin' lacks 'x', which its index promises"
