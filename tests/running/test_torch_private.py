"""torch's private names: each is there, and the package uses no other.

The list of them is inside a wing, since nobody else needs it.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached

import sn_export
from sn_export.running import torch_private

_PACKAGE = Path(sn_export.__file__).parent
_FILE = _PACKAGE / "running" / "torch_private.py"
_NAMES = [(cls, name) for cls, names in torch_private.ATTRIBUTES.items() for name in names]
_OF_SHARDS = [(cls, name) for cls, name in _NAMES if cls.startswith("FSDP")]


def _class_of_shards(cls: str) -> type:
    """Return the class of FSDP2 that has the names listed under ``cls``."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state

    name = cls.partition(",")[0]
    places = (_fsdp_param, _fsdp_param_group, _fsdp_state)
    found: type = next((vars(m)[name] for m in places if name in vars(m)), FSDPModule)
    return found


def _names_of(owner: type) -> set[str]:
    """Return what a class has, declares, and has its methods read or set."""
    codes = [f.__code__ for f in vars(owner).values() if hasattr(f, "__code__")]
    declared = getattr(owner, "__annotations__", ())
    return {*dir(owner), *declared}.union(*(code.co_names for code in codes))


def _owner(cls: str) -> Any:
    """Return something of torch that has the names listed under ``cls``."""
    return {
        "Module": lambda: nn.Linear(1, 1),
        "state dict": lambda: nn.Linear(1, 1).state_dict(),
        "lazy module that never ran": lambda: nn.LazyLinear(1),
        "RNNBase": lambda: nn.GRU(1, 1),
        "SpectralNormLink": lambda: spectral_norm(nn.Linear(1, 1)).parametrizations.weight[0],
        "BasePruningMethod": lambda: next(
            iter(prune.identity(nn.Linear(1, 1), "weight")._forward_pre_hooks.values())
        ),
        "compiled module": lambda: torch.compile(nn.Linear(1, 1), backend="eager"),
        "compiled method": lambda: torch.compile(nn.Linear(1, 1).forward, backend="eager"),
        "Tensor": lambda: torch.ones(1),
        "sparse Tensor": lambda: torch.ones(1).to_sparse(),
        "OpOverload": lambda: torch.ops.aten.add.Tensor,
    }[cls]()


@pytest.mark.parametrize(("cls", "name"), [name for name in _NAMES if name not in _OF_SHARDS])
def test_torch_has_not_moved_a_name(cls: str, name: str) -> None:
    """What is read of an object of torch's is there."""
    assert hasattr(_owner(cls), name)


def test_torch_has_not_moved_a_name_of_shards() -> None:
    """What is read of sharded models is there: no object without a process group, so by class."""
    missing = [
        f"{cls}.{name}" for cls, name in _OF_SHARDS if name not in _names_of(_class_of_shards(cls))
    ]
    assert missing == []


def test_what_is_made_of_private_names_works() -> None:
    """Each function that reaches into torch does what it says, on this torch."""
    layer = spectral_norm(nn.Linear(2, 2))
    with cached():
        _ = layer.weight
        assert torch_private.get_parametrize_cache()[id(layer), "weight"] is layer.weight
    tensor = torch.ones(2)
    tensor.add_(1)
    torch_private.set_version(tensor, 7)
    assert tensor._version == 7
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert any(handle.id in hooks for hooks in torch_private.get_hooks_of_all_modules())
    handle.remove()
    assert torch_private.find_newest_torchscript_opset() >= 18
    layer = nn.Linear(1, 1)
    assert torch_private.get_original(torch.compile(layer)) is layer
    assert torch_private.get_original(layer) is None
    assert [record.__name__ for record in torch_private.import_checkpoint_records()] == [
        "_StorageInfo",
        "_MEM_FORMAT_ENCODING",
    ]


def _export_shapes(layer: nn.Module, found: list[list[list[int]]]) -> None:
    content = io.BytesIO()
    torch.onnx.export(layer, (torch.ones(1, 30),), content, dynamo=False)
    file = onnx.load_from_string(content.getvalue())
    found.append([[*tensor.dims] for tensor in file.graph.initializer])
    found.append([[dim.dim_value for dim in file.graph.output[0].type.tensor_type.shape.dim]])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_are_set_aside_for_one_thread_and_one_block() -> None:
    """The file of the thread in the block has empty weights, all else as torch has them alone."""
    layer, whole = nn.Linear(30, 20), [[[20, 30], [20]], [[1, 20]]]
    for is_struck in (False, True):
        found: list[list[list[int]]] = []
        with suppress(KeyboardInterrupt), torch_private.setting_weights_aside() as weights:
            _export_shapes(layer, found)
            other = Thread(target=_export_shapes, args=(layer, found))
            other.start()
            other.join()
            if is_struck:
                raise KeyboardInterrupt
        _export_shapes(layer, found)
        assert found == [[[0], [0]], [[1, 20]], *whole, *whole]
        assert {name: tensor.data_ptr() for name, tensor in weights.items()} == {
            name: tensor.data_ptr() for name, tensor in layer.named_parameters()
        }


def _private_uses() -> Iterator[tuple[str, str]]:
    """Yield file and name of every import, dotted name and attribute that torch may move."""
    paths = [path for path in _PACKAGE.rglob("*.py") if path != _FILE]
    nodes = [(path.name, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    own = {"_Unpickler", "_fields"}  # those of Python, and below those of the package
    for _, node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            own.add(node.attr)  # torch's attributes of modules are read there of others, too
    for file, node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            for alias in node.names:
                if re.search(r"(^|\.)_(?!_)", f"{node.module}.{alias.name}"):
                    yield file, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            is_of_torch = ast.unparse(node).startswith("torch.")
            if is_of_torch or node.attr not in own:
                yield file, ast.unparse(node) if is_of_torch else node.attr


def test_no_other_private_name_is_used() -> None:
    """torch's private names stand in the one file, and every name that stands there is used."""
    listed = {name for names in torch_private.ATTRIBUTES.values() for name in names}
    rebuilders = {name for name in vars(torch_private.rebuild) if name.startswith("_rebuild_")}
    assert [use for use in _private_uses() if use[1] not in listed | rebuilders] == []
    texts = (path.read_text() for path in _PACKAGE.rglob("*.py") if path != _FILE)
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert {*listed, *torch_private.__all__} - words == set()
