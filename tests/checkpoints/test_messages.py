"""Messages of the readers that no other test holds, each with the input that causes it.

`write_safetensors` is called inside, with an entry that is not what it promises.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import copyreg
import dataclasses
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_networks import trained_critic
from cli_running import runner
from hostile_pickles import FORMATS
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import metadata as records
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal

from sn_export.checkpoints import convert_checkpoint, inspect_checkpoint, read_checkpoint
from sn_export.checkpoints.lazy_tensors import Entry, Spec
from sn_export.checkpoints.safetensors_file import write_safetensors
from sn_export.errors import CheckpointError


class Call:
    """Pickled as a call of a function, which pickle itself does not allow."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


def _build(kind: type, state: Any) -> Call:
    return Call(copyreg._reconstructor, kind, object, None, state=state)  # type: ignore[attr-defined]


_UTILS: Any = torch._utils
DAMAGED: dict[str, tuple[Any, str]] = {
    "tensor": (
        Call(_UTILS._rebuild_tensor_v2, None, 0, (2,), (1,), False, {}),
        "a tensor without a storage",
    ),
    "device": (
        Call(_UTILS._rebuild_device_tensor_from_cpu_tensor, 1, torch.float32, "cpu", False),
        "a tensor without values",
    ),
    "parameter": (Call(_UTILS._rebuild_parameter, 1, True, {}), "a parameter without a tensor"),
    "ordered": (Call(collections.OrderedDict, 3), "an ordered dictionary of no pairs"),
    "counter": (Call(collections.Counter, 3), "a counter of no counts"),
    "default": (Call(collections.defaultdict, 3), "a default that is no class"),
    "deque": (Call(collections.deque, 3), "a deque of no items"),
    "deque of a length": (Call(collections.deque, [], -1), "a deque of no length"),
    "bytes": (Call(codecs.encode, "a", "rot13"), "bytes in no encoding"),
    "bytearray": (Call(bytearray, 3), "a bytearray of no bytes"),
    "set": (Call(set, 3), "a set of no elements"),
    "size": (Call(torch.Size, 3), "no sizes"),
    "device name": (Call(torch.device, 3), "a device of no name"),
    "layout": (Call(torch.serialization._get_layout, 3), "a layout of no name"),
    "no layout": (Call(torch.serialization._get_layout, "torch.nn"), "the layout 'torch.nn'"),
    "format": (Call(records._MEM_FORMAT_ENCODING, "x"), "a memory format of no number"),
    "properties": (
        _build(records.TensorProperties, (1,)),
        "the properties of a tensor without a dtype",
    ),
    "index": (
        _build(records.MetadataIndex, {"fqn": 3}),
        "a part of a tensor without a name or place",
    ),
    "record": (
        _build(records.StorageMeta, {"x": 3}),
        "a StorageMeta with other fields than "
        f"{[field.name for field in dataclasses.fields(records.StorageMeta)]}",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_arguments_that_no_writer_writes(name: str, tmp_path: Path) -> None:
    """A function on the list refuses arguments that torch does not write."""
    content, reason = DAMAGED[name]
    torch.save({"w": torch.ones(2), "x": content}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert str(caught.value) == f"'{tmp_path / 'a.pt'}' is damaged: it holds {reason}"


RAW: dict[str, tuple[bytes, str]] = {
    "no arguments": (
        b"ccollections\nOrderedDict\nK\x03R.",
        "is damaged: it holds a call without arguments",
    ),
    "attribute": (
        b"cbuiltins\ngetattr\n(cbuiltins\nstr\nX\x04\x00\x00\x00jointR.",
        "wants to call 'builtins.getattr' while it is read",
    ),
    "extension": (b"\x82\x01.", "wants to use the pickle instruction EXT1 while it is read"),
    "elements": (b"](\x90.", "wants to add elements to a value of type 'list' while it is read"),
    "entries": (b"]NNs.", "wants to set entries of a value of type 'list' while it is read"),
    "append": (b"}Na.", "wants to append to a value of type 'dict' while it is read"),
    "identity": (
        b"K\x03Q.",
        "wants to load a value of type 'int' as a persistent object while it is read",
    ),
    "storage": (
        pickle.dumps(("storage", None, 3, 4, 5), 2)[:-1] + b"Q.",
        "is damaged: it holds a storage without a type, key, place or size",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_instructions_that_no_writer_writes(name: str, tmp_path: Path) -> None:
    """A forbidden instruction is named, and nothing is run."""
    content, reason = RAW[name]
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(FORMATS["zip"](tmp_path / "a.pt", content))
    assert reason in str(caught.value)


def _pieces(folder: Path, second: dict[str, Any], texts: dict[str, str] | None) -> None:
    info = '{"w": {"saved_offsets": [0]}, "v": {"saved_offsets": [2]}}'
    save_file({"w": torch.ones(2)}, folder / "1.safetensors", {"DCP_SHARDING_INFO": info})
    save_file(second, folder / "2.safetensors", texts and {"DCP_SHARDING_INFO": texts["w"]})


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one rank": (
        lambda folder: (folder / "__0.metadata").write_bytes(b"x"),
        "is no checkpoint: it holds '__0.metadata' of single ranks and no '.metadata', so the "
        "pieces cannot be put together",
    ),
    "folders": (
        lambda folder: (folder / "step-1").mkdir(),
        "or file of weights; give the one of its folders that is one: 'step-1'",
    ),
    "no records": (
        lambda folder: _pieces(folder, {"v": torch.ones(2)}, None),
        "is damaged or incomplete: '2.safetensors' does not say what its pieces are of",
    ),
    "dtypes": (
        lambda folder: _pieces(
            folder, {"w": torch.ones(2).double()}, {"w": '{"w": {"saved_offsets": [2]}}'}
        ),
        "is damaged or incomplete: the pieces of 'w' differ in dtype or dimensions",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    """For a folder that is no checkpoint the message says what it holds."""
    write, reason = FOLDERS[name]
    write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"folder '{tmp_path}' ")
    assert str(caught.value).endswith(reason)


def _spectral_norm(**changes: Any) -> dict[str, Any]:
    parts = {"orig": torch.eye(2, 3), "u": torch.tensor([1.0, 0]), "v": torch.tensor([1.0, 0, 0])}
    return {f"weight_{name}": value for name, value in (parts | changes).items()}


def _orthogonal(scale: float) -> dict[str, Any]:
    state = orthogonal(nn.Linear(3, 3, bias=False)).state_dict()
    state["parametrizations.weight.original"] = torch.ones(3, 3).tril() * scale
    return state


CONTENTS: dict[str, tuple[Any, str]] = {
    "nameless": ([torch.ones(2)], "holds no state dict: it holds tensors without names"),
    "nothing": ({}, "holds no state dict: it holds nothing"),
    "arrays": (
        {"a": np.ones(2), "b": np.float32(3)},
        "holds no state dict: it holds 1 numpy array ('a'); write a .npz with numpy.savez instead",
    ),
    "a class": (nn.Linear, "no state dict: it holds 'torch.nn.modules.linear.Linear', which was"),
    "a number": (3, "holds no state dict: it holds a value of type 'int'"),
    "whole numbers": (
        _spectral_norm(orig=torch.ones(2, 3, dtype=torch.int64)),
        "cannot spell 'weight' as plain: 'weight_orig' is no dense floating tensor",
    ),
    "dtypes": (
        _spectral_norm(u=torch.tensor([1.0, 0]).double()),
        "torch cannot normalise 'weight': its parts are 'float32', 'float64'",
    ),
    "dtypes of weight norm": (
        {"weight_g": torch.ones(2, 1).double(), "weight_v": torch.ones(2, 3)},
        "torch cannot normalise 'weight': ",
    ),
    "no values": (
        _spectral_norm(orig=torch.empty(2, 3, device="meta")),
        "cannot spell 'weight' as plain: 'weight_orig' is no dense floating tensor",
    ),
    "a part too many": (
        {
            f"parametrizations.weight.{end}": torch.ones(shape)
            for end, shape in (
                *(("original", (2, 3)), ("original0", (2, 1)), ("original1", (2, 3))),
                *(("1._u", (2,)), ("1._v", (3,))),
            )
        },
        "only the model's code says what makes it of '1._u', '1._v', 'original', 'original0', ",
    ),
    "no matrix": (
        {"parametrizations.w.original": torch.ones(3), "parametrizations.w.0.base": torch.eye(3)},
        "'parametrizations.w.original', 'parametrizations.w.0.base' are no matrices",
    ),
    "no finite map": (_orthogonal(1e38), "the orthogonal weight 'weight' would not be finite"),
    "no dim": (
        {"weight_g": torch.ones(1, 1, 1), "weight_v": torch.ones(5, 1, 1)},
        "cannot tell the dim of 'weight' [5, 1, 1]: the shape of g fits 1 or 2; say which with "
        "--dim weight=1",
    ),
    "plain beside it": (
        {"parametrizations.weight.original": torch.ones(2), "weight": torch.ones(2)}
        | {f"parametrizations.weight.0._{n}": torch.ones({"u": 2, "v": 1}[n]) for n in "uv"},
        "cannot spell 'parametrizations.weight.original' as 'weight': it exists",
    ),
    "none of several": (
        {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1), "x": torch.ones(1)}},
        "holds 2 state dicts, and none has spectral norm, weight norm or the like in it; choose "
        "with --key one of 'a' (1 tensor), 'b' (2 tensors)",
    ),
    "no orthogonal": (
        _spectral_norm(),
        "--orthogonal-map default is of no use: nothing needs it",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_cannot_be_converted(name: str, tmp_path: Path) -> None:
    """The tensor that cannot be converted is named, and no file is made."""
    content, reason = CONTENTS[name]
    torch.save(content, tmp_path / "a.pt")
    told: Any = "default" if name in ("no orthogonal", "no finite map") else None
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", orthogonal_map=told)
    assert reason in str(caught.value)
    with contextlib.suppress(CheckpointError):  # and nothing worse
        inspect_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "b.pt").exists()


def test_an_entry_that_is_another(tmp_path: Path) -> None:
    """A tensor of another dtype or shape than planned is refused, as it would shift the others."""
    entry = Entry(Spec(torch.float32, (2,)), lambda: torch.ones(3))
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path, "a.safetensors", {"w": entry}, {}, None, lambda name: None)
    assert str(caught.value) == "'w' came out as torch.float32 [3], not as torch.float32 [2]"


class Broken:
    """Fails when it is unpickled."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("of\nanother version")


def test_trusted_code_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of trusted code is shown in one line, and an absent package is named."""
    broken = Broken()
    broken.__dict__["x"] = 1
    torch.save({"w": broken}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt", trust_pickle=True)
    assert str(caught.value).endswith("a.pt' cannot be read: ValueError: of another version")
    monkeypatch.delattr(sys.modules[__name__], "Broken")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt", trust_pickle=True)
    assert str(caught.value).endswith(
        f"a.pt' needs 'Broken' of the module '{__name__}', which has no such name here"
    )


@pytest.mark.parametrize("value", ["1", "y", "YES", "True"])
def test_torch_is_told_to_use_its_own_unpickler(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If torch is forced to use its own unpickler, the message names the variable."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    read_checkpoint(tmp_path / "a.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert str(caught.value).endswith(
        "cannot be read while TORCH_FORCE_WEIGHTS_ONLY_LOAD is set, since torch then takes no "
        "unpickler but its own; unset it: here nothing in a file is run either"
    )


def test_answers_of_inspect_and_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers count by kind, none at all, and what had the spelling already."""
    run = runner(tmp_path, monkeypatch, capsys)
    net = nn.Sequential(prune.l1_unstructured(nn.Linear(2, 2), "weight", 1), nn.Linear(2, 2))
    chain = {
        "2.parametrizations.weight.original": torch.ones(2),
        "2.parametrizations.weight.0.x": 1,
    }
    torch.save(net.state_dict() | chain, "b.pt")
    assert run("inspect", "b.pt").out.startswith(
        "b.pt (torch): 7 entries, 1 tensor pruned, 1 under other parametrizations\n"
    )
    torch.save({"weight_g": torch.ones(()), "weight_v": torch.ones(2, 3)}, "b.pt")
    assert "g is one number for the whole tensor (dim=None)" in run("inspect", "b.pt").out
    torch.save(net[1].state_dict(), "b.pt")
    assert run("inspect", "b.pt").out == (
        "b.pt (torch): no spectral norm or other reparametrization of torch in 2 entries\n"
    )
    torch.save(trained_critic().state_dict(), "b.pt")
    assert run("convert", "b.pt", "--to", "hook", "-o", "c.pt").out == (
        "respelled nothing as hook; 4 were spelled so already\nwrote c.pt\n"
    )
