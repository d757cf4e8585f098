"""Dynamic shapes: which dimensions vary, to which sizes, and what each exporter calls them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .samples import InputSet, random_like

_SEED = 1
_FAR = 1 << 30


@dataclass(frozen=True)
class DynamicDim:
    """One dimension of one input tensor that may vary.

    Attributes:
        tensor: name of the input tensor, as `InputSet.named_tensors` gives it.
        position: index of the dimension.
        root: what it varies with; dimensions of one root vary together.
        size: its size in the example.
        spec: the entry of ``dynamic_shapes``.
    """

    tensor: str
    position: int
    root: str
    size: int
    spec: Any

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest size that the spec allows."""
        return _bound(self.spec, "min", 1), _bound(self.spec, "max", _FAR)

    def size_for(self, root_size: int) -> int:
        """Return the size when the root has ``root_size`` (they differ for ``2 * dim``)."""
        function = getattr(self.spec, "fn", None)
        return int(function(root_size)) if callable(function) else root_size

    def root_size(self) -> int:
        """Return the root's size in the example."""
        if not callable(getattr(self.spec, "fn", None)):
            return self.size
        return next((n for n in range(self.size * 4 + 8) if self.size_for(n) == self.size), 0)


def dynamic_dims(model: nn.Module, example: InputSet, dynamic_shapes: Any) -> list[DynamicDim]:
    """Return the dynamic dimensions that ``dynamic_shapes`` declares for ``example``.

    Args:
        model: gives the names of its forward's parameters.
        example: the example input.
        dynamic_shapes: as `torch.export.export` takes it: by parameter name, or in the order
            of the arguments; nested like the inputs; for each tensor a dict or a sequence of
            `torch.export.Dim`, ``Dim.AUTO``, ``Dim.DYNAMIC``, a name, or None.
    """
    if not dynamic_shapes:
        return []
    named = {id(tensor): name for name, tensor in example.named_tensors(model)}
    arguments: dict[str, Any] = dict(example.kwargs)
    names = _positional_names(model, len(example.args))
    arguments = dict(zip(names, example.args, strict=True)) | arguments
    if isinstance(dynamic_shapes, Mapping):
        pairs = [(arguments.get(name), spec) for name, spec in dynamic_shapes.items()]
    else:
        pairs = list(zip(arguments.values(), dynamic_shapes, strict=False))
    found = []
    for value, spec in pairs:
        for tensor, position, entry in _declared(value, spec):
            if not _is_static(entry):
                size = int(tensor.shape[position])
                root = _root(entry, size)
                found.append(DynamicDim(named[id(tensor)], position, root, size, entry))
    return found


def resized_sets(
    model: nn.Module, example: InputSet, dims: Sequence[DynamicDim]
) -> Iterator[InputSet]:
    """Yield random inputs like ``example`` with other sizes, each root varied, sizes in range.

    A larger, an odd and a smaller size, while there are such; the model may reject some.
    """
    if not dims:
        return
    roots: dict[str, list[DynamicDim]] = {
        root: list(group)
        for root, group in itertools.groupby(sorted(dims, key=lambda d: d.root), lambda d: d.root)
    }
    generator = torch.Generator().manual_seed(_SEED)
    names = {id(tensor): name for name, tensor in example.named_tensors(model)}
    seen: set[tuple[int, ...]] = set()
    for change in (
        lambda n: 2 * n + 1,
        lambda n: n + 1,
        lambda n: 2 * n,
        lambda n: n - 1,
    ):
        sizes = {root: _clamped(group, change) for root, group in roots.items()}
        if tuple(sizes.values()) in seen or all(
            sizes[root] == group[0].root_size() for root, group in roots.items()
        ):
            continue
        seen.add(tuple(sizes.values()))
        wanted = {(d.tensor, d.position): d.size_for(sizes[d.root]) for d in dims}

        def resize(tensor: Tensor, wanted: dict[tuple[str, int], int] = wanted) -> Tensor:
            name = names[id(tensor)]
            shape = [wanted.get((name, i), size) for i, size in enumerate(tensor.shape)]
            return random_like(_stretched(tensor, shape), generator)

        label = "size " + ", ".join(f"{root}={size}" for root, size in sizes.items())
        yield example.map(resize, label)


def dynamic_axes(dims: Sequence[DynamicDim]) -> dict[str, dict[int, str]]:
    """Return the dimensions as the TorchScript exporter takes them."""
    axes: dict[str, dict[int, str]] = {}
    for dim in dims:
        name = getattr(dim.spec, "__name__", dim.root)
        axes.setdefault(dim.tensor, {})[dim.position] = _identifier(str(name))
    return axes


def _declared(value: Any, spec: Any) -> Iterator[tuple[Tensor, int, Any]]:
    if spec is None or value is None:
        return
    if isinstance(value, Tensor):
        entries = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        for position, entry in entries:
            yield value, int(position) % max(value.ndim, 1), entry
    elif isinstance(value, Mapping) and isinstance(spec, Mapping):
        for key, inner in spec.items():
            yield from _declared(value.get(key), inner)
    elif isinstance(value, (tuple, list)) and isinstance(spec, (tuple, list)):
        for item, inner in zip(value, spec, strict=False):
            yield from _declared(item, inner)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    return (parameters + [f"input_{i}" for i in range(len(parameters), count)])[:count]


def _is_static(entry: Any) -> bool:
    return entry is None or isinstance(entry, int) or entry == torch.export.Dim.STATIC


def _root(entry: Any, size: int) -> str:
    if isinstance(entry, str):
        return entry
    root = getattr(entry, "root", entry)
    # Dim.AUTO and Dim.DYNAMIC have no name: equal sizes are taken to be one quantity.
    return str(getattr(root, "__name__", f"dim_{size}"))


def _bound(spec: Any, name: str, default: int) -> int:
    value = getattr(getattr(spec, "root", spec), name, None)
    return default if not isinstance(value, int) else value


def _clamped(group: Sequence[DynamicDim], change: Any) -> int:
    low = max([1, *(dim.range[0] for dim in group)])
    high = min(dim.range[1] for dim in group)
    return max(low, min(high, int(change(group[0].root_size()))))


def _stretched(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    # Only range, dtype and device matter to random_like; every value is seen at least once.
    index = tensor.detach()
    for position, size in enumerate(shape):
        old = index.shape[position]
        if old != size and old > 0:
            index = index.index_select(position, torch.arange(size, device=index.device) % old)
    return index


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)
