"""Dynamic shapes: which dimensions vary, and what each exporter calls them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..text import format_count
from .input_set import Binding, InputSet
from .nested import list_entries

_FAR = 1 << 30
_Dim: Any = torch.export.Dim
# Before torch 2.7 Dim is a function, and torch.export takes no names.
_TAKES_NAMES = isinstance(_Dim, type)
_DimType: Any = _Dim if _TAKES_NAMES else type(_Dim("name"))
Place = tuple[str, int]  # name of the tensor, index of the dimension
_FORMS = "a Dim, Dim.AUTO, Dim.DYNAMIC, a name, the size itself, or None"


@dataclass(frozen=True)
class DynamicDim:
    """One dimension of one input tensor that may vary.

    Attributes:
        tensor: name of the input tensor, as `InputSet.named_tensors` gives it.
        position: index of the dimension, from 0.
        root: name of what it varies with; dimensions of one root vary together.
        size: its size in the example.
        spec: the entry of ``dynamic_shapes``.
    """

    tensor: str
    position: int
    root: str
    size: int
    spec: Any

    @property
    def place(self) -> Place:
        """The dimension itself: the name of its tensor, and its index."""
        return self.tensor, self.position

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest size of the root that the spec allows."""
        return _read_bound(self.spec, "min", 0), _read_bound(self.spec, "max", _FAR)

    @property
    def is_promised(self) -> bool:
        """Whether the user asks for it; ``Dim.AUTO`` leaves it to the exporter."""
        return _read_hint(self.spec) != "AUTO"

    @property
    def is_named(self) -> bool:
        """Whether it has a name, that of its root; ``Dim.AUTO`` and ``Dim.DYNAMIC`` have none."""
        return _read_hint(self.spec) not in ("AUTO", "DYNAMIC")

    @property
    def is_root(self) -> bool:
        """Whether its name is that of its root; ``2 * dim`` has another."""
        return self.is_named and not callable(getattr(self.spec, "fn", None))

    def compute_size(self, root_size: int) -> int:
        """Return the size when the root has ``root_size`` (they differ for ``2 * dim``)."""
        function = getattr(self.spec, "fn", None)
        return int(function(root_size)) if callable(function) else root_size

    def find_root_size(self) -> int:
        """Return the root's size in the example."""
        if not callable(getattr(self.spec, "fn", None)):
            return self.size
        return next((n for n in range(self.size * 4 + 8) if self.compute_size(n) == self.size), 0)


def find_dynamic_dims(example: InputSet, dynamic_shapes: Any) -> list[DynamicDim]:
    """Return the dynamic dimensions that ``dynamic_shapes`` declares for ``example``.

    Args:
        example: the example input, bound.
        dynamic_shapes: as `torch.export.export` takes it: by parameter name, or in the order
            of the arguments; nested like the inputs; for each tensor a dict or a sequence of
            `torch.export.Dim`, ``Dim.AUTO``, ``Dim.DYNAMIC``, a name, the size itself, or None.
            What is left out is fixed. Dimensions may be counted from the end.

    Raises:
        TypeError: for an entry of another type.
        ValueError: for an input or a dimension that does not exist, a sequence of another length,
            a fixed size other than the example's, or a size outside its range.
    """
    if not dynamic_shapes:
        return []
    declared: dict[int, dict[int, Any]] = {}
    for name, value, spec in _iter_arguments(example, dynamic_shapes):
        declared.update(_find_declared_dims(name, value, spec))
    found: list[DynamicDim] = []
    for name, tensor in example.named_tensors():
        for position, entry in declared.get(id(tensor), {}).items():
            size = int(tensor.shape[position])
            dim = DynamicDim(name, position, _name_root(entry, size), size, entry)
            _require_in_range(dim)
            _require_one_size(dim, found)
            found.append(dim)
    return found


def flatten_shapes(
    names: Sequence[str], dims: Sequence[DynamicDim]
) -> tuple[dict[int, Any] | None, ...] | None:
    """Return the dimensions as `torch.export.export` takes them, for each of these tensors.

    ::

        flatten_shapes(["x", "mask"], [the dimension 0 of "x"])  # ({0: Dim("batch")}, None)
    """
    if not dims:
        return None
    shapes: dict[str, dict[int, Any]] = {}
    for dim in dims:
        spec = _Dim(dim.spec) if isinstance(dim.spec, str) and not _TAKES_NAMES else dim.spec
        shapes.setdefault(dim.tensor, {})[dim.position] = spec
    return tuple(shapes.get(name) for name in names)


def make_dynamic_axes(
    names: Mapping[str, str], dims: Sequence[DynamicDim]
) -> dict[str, dict[int, str]]:
    """Return the dimensions as the TorchScript exporter takes them: ``{"x": {0: "batch"}}``.

    Args:
        names: what each tensor is called in the file.
        dims: the dynamic dimensions.
    """
    axes: dict[str, dict[int, str]] = {}
    for dim in dims:
        name = getattr(dim.spec, "__name__", dim.root)
        axes.setdefault(names[dim.tensor], {})[dim.position] = _make_identifier(str(name))
    return axes


def _iter_arguments(example: InputSet, dynamic_shapes: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each argument that ``dynamic_shapes`` names: its name, its value and its entry."""
    arguments, binding = example.arguments, example.binding or Binding({})
    if isinstance(dynamic_shapes, Mapping):
        for name, spec in dynamic_shapes.items():
            if name in arguments:
                yield name, arguments[name], spec
            elif name == binding.collector and isinstance(spec, Mapping):
                for key, inner in spec.items():
                    _require_known(f"{name}[{key!r}]", key in binding.collected, arguments)
                    known = binding.collected[key]
                    yield known, arguments[known], inner
            else:
                # A parameter that the example leaves at its default has nothing to vary.
                _require_known(repr(name), False, arguments)
    elif isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) > len(arguments):
            raise ValueError(
                f"dynamic_shapes has {format_count(len(dynamic_shapes), 'entry')}, the example "
                f"input {len(arguments)}: {', '.join(arguments)}"
            )
        for (name, value), spec in zip(arguments.items(), dynamic_shapes, strict=False):
            yield name, value, spec
    else:
        raise TypeError(
            "dynamic_shapes must be a dict by parameter name or a sequence in the order of the "
            f"arguments, got {type(dynamic_shapes).__name__}"
        )


def _require_known(name: str, is_known: bool, arguments: Mapping[str, Any]) -> None:
    if not is_known:
        raise ValueError(
            f"dynamic_shapes names the input {name}, which the example input does not have; "
            f"it has {', '.join(arguments)}"
        )


def _find_declared_dims(name: str, value: Any, spec: Any) -> dict[int, dict[int, Any]]:
    """Return the dynamic dimensions of each tensor in ``value``, by its id.

    Not by name: ``a[0]`` and an argument ``a_0`` have the same name until one gets a number.
    """
    if spec is None:
        return {}
    if isinstance(value, Tensor):
        entries = {
            position: entry
            for position, entry in _iter_entries(name, value, spec)
            if not _is_fixed(f"dimension {position} of '{name}'", entry, value.shape[position])
        }
        return {id(value): entries}
    found: dict[int, dict[int, Any]] = {}
    for key, item, inner in _list_nested_entries(name, value, spec):
        found.update(_find_declared_dims(f"{name}_{key}", item, inner))
    return found


def _list_nested_entries(name: str, value: Any, spec: Any) -> list[tuple[str, Any, Any]]:
    """Return what a container holds: the key, the item, and the entry of ``dynamic_shapes``."""
    content = list_entries(value)
    if content is None:
        kind = type(value).__name__
        raise ValueError(f"dynamic_shapes names '{name}', which is no tensor but of type {kind}")
    is_ordered = isinstance(value, (tuple, list))
    if isinstance(spec, Mapping) and not is_ordered:
        held = dict(content)
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        names = {*held, *(field.name for field in fields)}
        unknown = [key for key in spec if str(key) not in names]
        if unknown:
            raise ValueError(
                f"dynamic_shapes of '{name}' has the key {unknown[0]!r}, the input "
                f"{', '.join(map(repr, held))}"
            )
        # ``held`` lacks the fields of a registered dataclass that are None.
        return [(str(key), held.get(str(key)), inner) for key, inner in spec.items()]
    if isinstance(spec, (tuple, list)) and not isinstance(value, dict):
        if len(content) != len(spec):
            raise ValueError(
                f"dynamic_shapes of '{name}' has {format_count(len(spec), 'entry')}, the input "
                f"{len(content)}"
            )
        return [(key, item, inner) for (key, item), inner in zip(content, spec, strict=True)]
    raise TypeError(
        f"dynamic_shapes of '{name}' must be nested like the input, a "
        f"{type(value).__name__}, got {type(spec).__name__}"
    )


def _iter_entries(name: str, tensor: Tensor, spec: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(spec, Mapping):
        for position, entry in spec.items():
            is_index = isinstance(position, int) and not isinstance(position, bool)
            if not is_index or not -tensor.ndim <= position < tensor.ndim:
                raise ValueError(
                    f"dynamic_shapes names dimension {position!r} of '{name}', whose shape is "
                    f"{tuple(tensor.shape)}"
                )
            yield position % tensor.ndim, entry
    elif isinstance(spec, (tuple, list)):
        if len(spec) != tensor.ndim:
            raise ValueError(
                f"dynamic_shapes of '{name}' has {format_count(len(spec), 'entry')}, its shape is "
                f"{tuple(tensor.shape)}"
            )
        yield from enumerate(spec)
    else:
        raise TypeError(
            f"dynamic_shapes of '{name}' must be a dict by dimension, a sequence for all "
            f"dimensions, or None, got {spec!r}"
        )


def _is_fixed(where: str, entry: Any, size: int) -> bool:
    if entry is None or _read_hint(entry) == "STATIC":
        return True
    if isinstance(entry, bool) or not (
        isinstance(entry, (int, str, _DimType)) or _read_hint(entry) in ("AUTO", "DYNAMIC")
    ):
        raise TypeError(f"dynamic_shapes of {where} must be {_FORMS}, got {entry!r}")
    if isinstance(entry, int):
        if entry != size:
            raise ValueError(f"dynamic_shapes fixes {where} at {entry}, the example has {size}")
        return True
    if entry == "":
        raise ValueError(f"dynamic_shapes of {where} must be {_FORMS}, got an empty name")
    return False


def _require_in_range(dim: DynamicDim) -> None:
    low, high = dim.range
    if not low <= dim.find_root_size() <= high:
        raise ValueError(
            f"dimension {dim.position} of '{dim.tensor}' is {dim.size} in the example, outside "
            f"the range {low} to {high} of {dim.root}"
        )


def _require_one_size(dim: DynamicDim, others: Sequence[DynamicDim]) -> None:
    other = next((one for one in others if one.root == dim.root), dim)
    if other.find_root_size() != dim.find_root_size():
        raise ValueError(
            f"dynamic_shapes calls dimension {other.position} of '{other.tensor}' and dimension "
            f"{dim.position} of '{dim.tensor}' both {dim.root}, and the example has {other.size} "
            f"in the one and {dim.size} in the other"
        )


def _read_hint(entry: Any) -> str:
    """Return AUTO, DYNAMIC or STATIC for such a hint, and another text for anything else."""
    kind = getattr(entry, "type", entry)  # an enumeration of its own before torch 2.7
    return str(getattr(kind, "name", ""))


def _name_root(entry: Any, size: int) -> str:
    """Return the name of what a dimension varies with: ``"batch"`` for ``2 * Dim("batch")``."""
    if isinstance(entry, str):
        return entry
    root = getattr(entry, "root", entry)
    # Dim.AUTO and Dim.DYNAMIC have no name: equal sizes are taken to be one quantity.
    return str(getattr(root, "__name__", f"dim_{size}"))


def _read_bound(spec: Any, name: str, default: int) -> int:
    value = getattr(getattr(spec, "root", spec), name, None)
    return default if not isinstance(value, int) else value


def _make_identifier(name: str) -> str:
    """Return a name that ONNX takes for a dimension: ``"batch_size"`` for ``"batch-size"``."""
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)
