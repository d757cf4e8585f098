"""The closed list of names that a pickle may call, for every format, and what each of them does.

Nothing is imported or looked up by a name from a file. Torch's own functions rebuild tensors, and
their arguments are checked before they are called.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from ..running import import_checkpoint_records, rebuild
from ..text import describe_type, format_count, quote_name
from .lazy_tensors import is_count, is_shape

# A tensor may have so many elements although its storage has fewer, as after expand(). Without a
# limit a few bytes could become 4 TB once the tensor is copied.
_EXPANDED = 2**24
_StorageInfo, _MemoryFormat = import_checkpoint_records()


class ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle wants to do what the list forbids, which the text says: ``"call 'posix.mkdir'"``."""


class DamagedPickleError(pickle.UnpicklingError):
    """A pickle holds what no writer writes, which the text says: ``"a set of no elements"``."""


@dataclass(frozen=True, eq=False)
class Global:
    """A class or function that a pickle names: this record replaces it on the stack and in content.

    Attributes:
        name: its qualified name.
        call: what REDUCE calls; None if it cannot be called.
        new: what NEWOBJ and NEWOBJ_EX call; None if no object of it can be made.
    """

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


@dataclass(eq=False)
class Unread:
    """A placeholder of a value that was left unread, since its package would have to be imported.

    Attributes:
        name: qualified name of its class.
    """

    name: str


def call_global(target: Any, how: str, args: Any, kwargs: Any) -> Any:
    """Call ``target.call`` or ``target.new``, as ``how`` says, with arguments from a file.

    Raises:
        ForbiddenPickleError: if ``target`` is no `Global`, or has no such function.
        DamagedPickleError: if the arguments are no tuple, or do not suit the function.
    """
    function = getattr(target, how) if type(target) is Global else None
    if function is None:
        raise ForbiddenPickleError(f"call {describe_value(target)}")
    if type(args) is not tuple or type(kwargs) is not dict:
        raise DamagedPickleError("a call without arguments")
    return function(*args, **kwargs)


def describe_value(value: Any) -> str:
    """Return a text for a message: the name of a `Global`, or the type of any other value."""
    return quote_name(value.name) if type(value) is Global else describe_type(value)


def as_key(value: Any) -> Any:
    """Return ``value`` if it is allowed as a key: its hash must be cheap, and so must its text.

    The hash of a tuple is not cached. Sixty tuples, each of which holds the one before twice, take
    a few bytes in a file and years to hash.
    """
    inner = value if type(value) in (tuple, torch.Size) else (value,)
    if not all(type(one) in _KEYS for one in inner):
        raise DamagedPickleError(f"{describe_value(value)} as a key")
    if any(type(one) is int and one.bit_length() > _KEY_BITS for one in inner):
        raise DamagedPickleError(f"a number of more than {_KEY_BITS} bits as a key")
    return value


_KEY_BITS = 1024
_KEYS = (
    *(str, bytes, int, float, complex, bool, type(None), torch.dtype),
    *(Global, Unread, dcp.MetadataIndex),
)


def _require(is_sound: bool, what: str) -> None:
    if not is_sound:
        raise DamagedPickleError(what)


def _require_held(storage: Any, size: Any, stride: Any) -> None:
    """Raise unless ``storage`` can be that of a tensor of this size."""
    _require(is_shape(size) and is_shape(stride), "a tensor whose shape is no list of sizes")
    _require(isinstance(storage, torch.storage.TypedStorage), "a tensor without a storage")
    count, held = math.prod(size), len(storage)
    _require(
        count <= max(held, _EXPANDED),
        f"a tensor of shape {list(size)} whose storage holds {format_count(held, 'element')}",
    )


def _read_flags(metadata: Any) -> dict[str, bool]:
    """Return the flags of a tensor that is stored conjugated or negated: ``{"conj": True}``."""
    given = metadata if type(metadata) is dict else {}
    return {name: True for name in ("conj", "neg") if given.get(name) is True}


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: Any = None,
) -> Tensor:
    _require_held(storage, size, stride)
    # Hooks are code. Torch writes none, so the empty dictionary replaces whatever is there.
    known: Any = (storage, offset, size, stride, requires_grad is True, OrderedDict())
    if dtype is None:
        return rebuild._rebuild_tensor_v2(*known, _read_flags(metadata))  # type: ignore[no-any-return]
    return rebuild._rebuild_tensor_v3(*known, dtype, _read_flags(metadata))  # type: ignore[no-any-return]


def _tensor_of_dtype(*args: Any) -> Tensor:
    *known, dtype, metadata = args if len(args) == 8 else (*args, None)
    return _tensor(*known, metadata, dtype)  # type: ignore[call-arg]


def _quantized(
    storage: Any, offset: Any, size: Any, stride: Any, scheme: Any, grad: Any, hooks: Any
) -> Tensor:
    _require_held(storage, size, stride)
    result: Tensor = rebuild._rebuild_qtensor(
        storage, offset, size, stride, scheme, grad is True, OrderedDict()
    )
    return result


def _meta(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    _require(is_shape(size) and is_shape(stride), "a tensor whose shape is no list of sizes")
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _from_device(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Tensor:
    _require(isinstance(data, Tensor) and isinstance(dtype, torch.dtype), "a tensor without values")
    result: Tensor = data.to(dtype)
    return result


def _parameter(data: Any, requires_grad: Any = True, *rest: Any) -> torch.nn.Parameter:
    _require(isinstance(data, Tensor), "a parameter without a tensor")
    can = data.is_floating_point() or data.is_complex()
    return torch.nn.Parameter(data, requires_grad is True and can)


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Return a tensor that was saved with attributes; the attributes are left out."""
    value = call_global(function, "call", args, {})
    if type(kind) is not Global or kind.name not in (_TENSOR, _PARAMETER):
        raise ForbiddenPickleError(f"make {describe_value(kind)}")
    return _parameter(value) if kind.name == _PARAMETER else value


def _ordered(pairs: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
    _require(type(pairs) in (tuple, list), "an ordered dictionary of no pairs")
    _require(all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs), "no pair")
    return OrderedDict((as_key(key), value) for key, value in pairs)


def _counter(counts: Any = None) -> Counter[Any]:
    _require(counts is None or type(counts) is dict, "a counter of no counts")
    return Counter(counts)


def _default(factory: Any = None) -> defaultdict[Any, Any]:
    _require(factory is None or type(factory) is Global, "a default that is no class")
    if factory is not None and factory.name not in _FACTORIES:
        raise ForbiddenPickleError(f"call {describe_value(factory)}")
    return defaultdict(_FACTORIES[factory.name] if factory is not None else None)


def _deque(items: Any = (), maxlen: Any = None) -> deque[Any]:
    _require(type(items) in (tuple, list), "a deque of no items")
    _require(maxlen is None or is_count(maxlen), "a deque of no length")
    return deque(items, maxlen)


def _encode(text: Any, encoding: Any) -> bytes:
    _require(type(text) is str and encoding in ("latin1", "latin-1"), "bytes in no encoding")
    return str(text).encode("latin-1")


def _bytearray(content: Any = b"", encoding: Any = None) -> bytearray:
    content = _encode(content, encoding) if type(content) is str else content
    _require(type(content) is bytes, "a bytearray of no bytes")
    return bytearray(content)


def _set(elements: Any = ()) -> set[Any]:
    _require(type(elements) in (tuple, list), "a set of no elements")
    return set(map(as_key, elements))


def _complex(real: Any, imaginary: Any = 0) -> complex:
    return complex(float(real), float(imaginary))


def _size(sizes: Any = ()) -> torch.Size:
    _require(type(sizes) in (tuple, list) and all(type(n) is int for n in sizes), "no sizes")
    return torch.Size(sizes)


def _device(kind: Any, index: Any = None) -> torch.device:
    _require(type(kind) is str and (index is None or type(index) is int), "a device of no name")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: Any) -> torch.layout:
    _require(type(name) is str and name.startswith("torch."), "a layout of no name")
    layout = getattr(torch, name.removeprefix("torch."), None)
    _require(isinstance(layout, torch.layout), f"the layout {quote_name(name)}")
    assert isinstance(layout, torch.layout)
    return layout


def _reconstruct(kind: Any, base: Any, state: Any) -> Any:
    return call_global(kind, "new", (), {})


def _memory_format(value: Any) -> Any:
    _require(type(value) is int, "a memory format of no number")
    return _MemoryFormat(value)


def _enum_member(kind: Any, name: Any) -> Any:
    """Return a member of an enumeration, which Python 3.11.0 to 3.11.3 pickles by its name.

    They write ``getattr(Class, "NAME")``, and other versions ``Class(value)``. Any other call of
    getattr is refused.
    """
    members: Mapping[str, Any] = _ENUMS.get(kind.name, {}) if type(kind) is Global else {}
    if type(name) is not str or name not in members:
        raise ForbiddenPickleError("call 'builtins.getattr'")
    return members[name]


def _restore_versions(target: OrderedDict[Any, Any], state: Any) -> None:
    """Set the versions of the modules on a state dict, the one attribute that torch gives it."""
    versions = state.get("_metadata") if type(state) is dict else None
    if type(versions) in (dict, OrderedDict):
        target._metadata = versions  # type: ignore[attr-defined]


def _restore_properties(target: dcp.TensorProperties, state: Any) -> None:
    _require(
        type(state) is tuple and len(state) == 5 and isinstance(state[0], torch.dtype),
        "the properties of a tensor without a dtype",
    )
    target.__setstate__(state)  # type: ignore[no-untyped-call]


def _restore_index(target: dcp.MetadataIndex, state: Any) -> None:
    _restore_fields(target, state)
    sound = type(target.fqn) is str and (target.offset is None or is_shape(target.offset))
    _require(sound, "a part of a tensor without a name or place")


# Fields of the records that torch 2.6 does not write: folders of a newer one are read with it, too.
_NEWER = ("version", "modules", "transform_descriptors")


def _restore_fields(target: Any, state: Any) -> None:
    names = [field.name for field in fields(target)]
    _require(
        type(state) is dict and all(name in names or name in _NEWER for name in state),
        f"a {type(target).__name__} with other fields than {names}",
    )
    for name, value in state.items():
        object.__setattr__(target, name, value)  # some are frozen


_TENSOR, _PARAMETER = "torch.Tensor", "torch.nn.parameter.Parameter"
_RECORDS: tuple[type[Any], ...] = (
    *(dcp.Metadata, dcp.StorageMeta, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata),
    *(dcp.ChunkStorageMetadata, dcp.MetadataIndex, dcp.TensorProperties, _StorageInfo),
)
BUILDERS: dict[type[Any], Callable[[Any, Any], None]] = {
    **dict.fromkeys(_RECORDS, _restore_fields),
    OrderedDict: _restore_versions,
    dcp.TensorProperties: _restore_properties,
    dcp.MetadataIndex: _restore_index,
    Unread: lambda target, state: None,
}
_FACTORIES: dict[str, type[Any]] = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (OrderedDict, dict, list, set, tuple, str, bytes, int, float, complex, bool)
}
_MEMORY_FORMAT = "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"
_ENUMS = {_MEMORY_FORMAT: _MemoryFormat.__members__}
_CALLED: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": rebuild._rebuild_sparse_tensor,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_device,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    _MEMORY_FORMAT: _memory_format,
    "builtins.getattr": _enum_member,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "collections.defaultdict": _default,
    "collections.deque": _deque,
    "copyreg._reconstructor": _reconstruct,
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "builtins.set": _set,
    "builtins.frozenset": lambda elements=(): frozenset(_set(elements)),
    "builtins.complex": _complex,
}
_MADE: dict[str, Callable[[], Any]] = {
    "collections.OrderedDict": lambda: OrderedDict(),
    **{
        f"{kind.__module__}.{kind.__qualname__}": partial(object.__new__, kind) for kind in _RECORDS
    },
}
_NAMED = (_TENSOR, _PARAMETER, "builtins.object", "builtins.NoneType", *_FACTORIES)


def _list_globals() -> dict[tuple[str, str], Global]:
    names = dict.fromkeys((*_NAMED, *_CALLED, *_MADE))
    found = {name: Global(name, _CALLED.get(name), _MADE.get(name)) for name in names}
    split = {name: name.rpartition(".") for name in names}
    return {(split[name][0], split[name][2]): found[name] for name in names}


GLOBALS = _list_globals()
