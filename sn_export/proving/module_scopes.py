"""Module boundaries: which values of a file are the outputs of which modules.

The dynamo exporter writes the modules around each node into its metadata
(``pkg.torch.onnx.name_scopes``), the TorchScript exporter into its name
(``/body/body.0/conv/Conv``). A value that leaves the nodes of a module is an output of it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from torch import nn

from ..text import qualify

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


def find_module_values(
    model: nn.Module, file: onnx.ModelProto, called: Collection[str]
) -> dict[str, ModuleValues]:
    """Return the values of each module by its path, without the model itself.

    Modules without any node in the file, which do nothing or were fused into others, are
    absent. A module with several paths has its first.

    Args:
        model: the model.
        file: what an exporter made of it.
        called: paths of the modules that run by being called. One whose children are used
            without it, as those of a ModuleDict, has no part in a TorchScript name.
    """
    first_paths = {id(module): path for path, module in model.named_modules()}
    passed_over = {path for path, _ in model.named_modules()} - {"", *called}
    scopes = _Scopes(model, file, frozenset(passed_over))
    within = [
        {first_paths[id(module)] for module in scopes.find_modules(node)}
        for node in file.graph.node
    ]
    readers: dict[str, list[set[str]]] = defaultdict(list)
    for node, modules in zip(file.graph.node, within, strict=True):
        for name in _collect_reads(node):
            readers[name].append(modules)
    for output in file.graph.output:
        readers[output.name].append(set())
    leaving: dict[str, list[str]] = defaultdict(list)
    inside: dict[str, list[str]] = defaultdict(list)
    read: dict[str, dict[str, None]] = defaultdict(dict)
    for node, modules in zip(file.graph.node, within, strict=True):
        for module in modules:
            read[module].update(dict.fromkeys(_collect_reads(node)))
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


def _collect_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _collect_reads(inner)
            yield from (output.name for output in graph.output)


def _find_in_metadata(model: nn.Module, text: str) -> list[nn.Module]:
    """Return the modules that dynamo's metadata names: ``"['', 'body', 'body.0', 'conv2d']"``."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    if not isinstance(scopes, list):
        return []
    # The last entry is the operator; torch may mark later calls of a module by '@1'.
    paths = [scope.partition("@")[0] for scope in scopes[:-1] if isinstance(scope, str)]
    found = (_get_child(model, path) for path in paths if path)
    return [module for module in found if module is not None]


class _Scopes:
    """The modules that each node of a file may belong to, below the model itself."""

    def __init__(
        self, model: nn.Module, file: onnx.ModelProto, passed_over: frozenset[str]
    ) -> None:
        self._model = model
        self._passed_over = passed_over
        self._bases: dict[str, list[tuple[str, nn.Module]]] = {}
        weights = {weight.name for weight in file.graph.initializer}
        self._read: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for node in file.graph.node:
            parts = _split_name(node)
            for end in range(1, len(parts) + 1):
                self._read[parts[:end]].update(weights.intersection(node.input))

    def find_modules(self, node: onnx.NodeProto) -> list[nn.Module]:
        """Return the modules of a node, from dynamo's metadata or from its name by TorchScript."""
        for entry in node.metadata_props:
            if entry.key == _SCOPES:
                return _find_in_metadata(self._model, entry.value)
        return self._follow_name(_split_name(node), node.input)

    def _follow_name(self, parts: tuple[str, ...], read: Collection[str]) -> list[nn.Module]:
        """Walk down from the model by the parts of a TorchScript name.

        A part is the name of a child, or its path where it stands in a container, and the n-th call
        adds ``_n``. ``act_1`` may be a child of that name or the second call of ``act``: then the
        node counts for both.
        """
        found: list[nn.Module] = []
        reached = [("", self._model)]
        for end, part in enumerate(parts, 1):
            below: list[tuple[str, nn.Module]] = []
            for base, module in reached:
                for name in dict.fromkeys((part, re.sub(r"_\d+$", "", part))):
                    relative = name.removeprefix(f"{base}.") if base else name
                    below += self._find_named(
                        base, module, relative, (read, self._read[parts[:end]])
                    )
            found += [module for _, module in below]
            reached = below
        return found

    def _find_named(
        self, base: str, module: nn.Module, relative: str, reads: tuple[Collection[str], ...]
    ) -> list[tuple[str, nn.Module]]:
        """Return the module at ``relative``, directly or below modules that are passed over.

        Of several it is the one whose weights are read; where that does not decide, none.
        """
        if base not in self._bases:
            self._bases[base] = [(base, module), *self._iter_passed(base, module)]
        found = [(path, _get_child(one, relative)) for path, one in self._bases[base]]
        once = {id(child): (qualify(path, relative), child) for path, child in found[::-1]}
        there = [(path, child) for path, child in reversed(once.values()) if child is not None]
        for read in reads:
            if len(there) < 2:
                return there
            reading = [one for one in there if any(w.startswith(f"{one[0]}.") for w in read)]
            there = reading or there
        return there if len(there) < 2 else []

    def _iter_passed(self, base: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = qualify(base, name)
            if path in self._passed_over:
                yield path, child
                yield from self._iter_passed(path, child)


def _split_name(node: onnx.NodeProto) -> tuple[str, ...]:
    """Return the scopes in a TorchScript name: ``body`` and ``body.0`` of ``/body/body.0/Conv``."""
    return tuple(node.name.split("/")[1:-1]) if node.name.startswith("/") else ()


def _get_child(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


def find_using_modules(value: ir.Value) -> list[str]:
    """Return the paths of the modules whose nodes read ``value``, as the exporter names them."""
    return list(dict.fromkeys(_name_module(node) for node in value.consumers()))


def _name_module(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is not None:  # ['', 'body', 'body.0', 'conv2d'], by the dynamo exporter
        return str(["", *ast.literal_eval(scopes)[:-1]][-1])
    # "/body/body.0/conv/Conv", by the TorchScript exporter: parts of a container repeat its name.
    path = before = ""
    for part in (node.name or "").split("/")[1:-1]:
        nested = before and part.startswith(before + ".")
        path = path.removesuffix(before) + part if nested else qualify(path, part)
        before = part
    return path
