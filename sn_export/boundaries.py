"""Module boundaries: which values of a file are the outputs of which modules.

The dynamo exporter writes the modules around each node into its metadata
(``pkg.torch.onnx.name_scopes``), the TorchScript exporter into its name
(``/body/body.0/conv/Conv``). A value that leaves the nodes of a module is an output of it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from torch import nn

from .words import qualified

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class ModuleValues:
    """The values of a file that are made inside one module.

    Attributes:
        leaving: names of the values that are read outside the module, in the file's order.
        inside: names of all values.
        entering: names of the values made outside that are read inside, initializers included.
    """

    leaving: tuple[str, ...]
    inside: tuple[str, ...]
    entering: tuple[str, ...] = ()


def module_values(model: nn.Module, file: onnx.ModelProto) -> dict[str, ModuleValues]:
    """Return the values of each module by its path, without the model itself.

    Modules without any node in the file, which do nothing or were fused into others, are
    absent. A module with several paths has its first.
    """
    first_paths = {id(module): path for path, module in model.named_modules()}
    within = [
        {first_paths[id(module)] for module in _modules_of(model, node)} for node in file.graph.node
    ]
    readers: dict[str, list[set[str]]] = defaultdict(list)
    for node, modules in zip(file.graph.node, within, strict=True):
        for name in _read_by(node):
            readers[name].append(modules)
    for output in file.graph.output:
        readers[output.name].append(set())
    leaving: dict[str, list[str]] = defaultdict(list)
    inside: dict[str, list[str]] = defaultdict(list)
    read: dict[str, dict[str, None]] = defaultdict(dict)
    for node, modules in zip(file.graph.node, within, strict=True):
        for module in modules:
            read[module].update(dict.fromkeys(_read_by(node)))
        for name in filter(readers.__contains__, node.output):
            for module in modules:
                inside[module].append(name)
                if any(module not in reader for reader in readers[name]):
                    leaving[module].append(name)
    return {
        module: ModuleValues(
            tuple(leaving[module]),
            tuple(names),
            tuple(name for name in read[module] if name not in names),
        )
        for module, names in inside.items()
    }


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (output.name for output in graph.output)


def _modules_of(model: nn.Module, node: onnx.NodeProto) -> list[nn.Module]:
    """Return the modules that a node may belong to, below the model itself."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return _from_metadata(model, entry.value)
    return _from_name(model, node.name.split("/")[1:-1]) if node.name.startswith("/") else []


def _from_metadata(model: nn.Module, text: str) -> list[nn.Module]:
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    if not isinstance(scopes, list):
        return []
    # The last entry is the operator; torch may mark later calls of a module by '@1'.
    paths = [scope.partition("@")[0] for scope in scopes[:-1] if isinstance(scope, str)]
    found = (_child(model, path) for path in paths if path)
    return [module for module in found if module is not None]


def _from_name(model: nn.Module, parts: list[str]) -> list[nn.Module]:
    """Walk down from the model by the parts of a TorchScript name.

    A part is the name of a child, or its path where it stands in a container, and the n-th call
    adds ``_n``. ``act_1`` may be a child of that name or the second call of ``act``: then the
    node counts for both.
    """
    found: list[nn.Module] = []
    reached = [("", model)]
    for part in parts:
        below: list[tuple[str, nn.Module]] = []
        for base, module in reached:
            for name in dict.fromkeys((part, re.sub(r"_\d+$", "", part))):
                relative = name.removeprefix(f"{base}.") if base else name
                child = _child(module, relative)
                if child is not None:
                    below.append((qualified(base, relative), child))
        found += [module for _, module in below]
        reached = below
    return found


def _child(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module
