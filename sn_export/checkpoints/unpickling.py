"""A stack machine for pickles that can reach nothing but the names of one closed list.

A pickle is a program. Its dangerous instructions find a class or function by name (GLOBAL,
STACK_GLOBAL, EXT, INST), call one (REDUCE, NEWOBJ, OBJ), or hand an object its state (BUILD), which
sets attributes on whatever is on the stack. This machine looks up a name in the list alone, and
puts a `Global` on the stack: a record that only the machine can call, never the class, function or
module itself. So no order of instructions reaches anything else. The machine reads every format:
torch's zip and legacy files, shards of them, and the folders of torch.distributed.checkpoint.
"""

from __future__ import annotations

import math
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any, BinaryIO, ClassVar, NoReturn

import torch
from torch.serialization import StorageType

from .lazy_tensors import is_count
from .pickle_globals import (
    BUILDERS,
    GLOBALS,
    DamagedPickleError,
    ForbiddenPickleError,
    Global,
    Unread,
    as_key,
    call_global,
    describe_value,
)

# Instructions that no writer of checkpoints uses; they need a class, a registry or a buffer.
_CODE = ("INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
_Machine: Any = pickle._Unpickler  # the one in Python, whose instructions can be replaced


_CONSTANTS = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme))
}

# Classes of values without weights that often stand beside them, and functions that make these.
_HARMLESS = re.compile(
    "|".join(
        (
            r"argparse\.Namespace|types\.SimpleNamespace|typing\.Any|uuid\.UUID",
            r"builtins\.(range|slice)|decimal\.Decimal|fractions\.Fraction",
            r"datetime\.(date|datetime|time|timedelta|timezone)",
            r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path",
            r"numpy\.(ndarray|dtype|matrix|bool_?|[a-z]+\d+)",
            r"numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)",
            r"torch\.torch_version\.TorchVersion",
            r"omegaconf(\.\w+)*\.[A-Z]\w*",
            r"easydict\.EasyDict|addict\.addict\.Dict|munch\.Munch|yacs\.config\.CfgNode",
            r"ml_collections\.config_dict\.config_dict\.(Frozen)?ConfigDict",
            r"mmengine\.logging\.history_buffer\.HistoryBuffer",
            r"(mmengine\.config|mmcv\.utils)\.config\.Config(Dict)?",
            r"(pytorch_lightning|lightning\.pytorch)\.utilities\.parsing\.AttributeDict",
            r"lightning(\.|_)fabric\.utilities\.data\.AttributeDict",
        )
    )
)


def find_global(module: str, name: str, unread: set[str]) -> Any:
    """Return what stands for ``module.name`` on the stack; nothing is imported.

    A name that is not on the list may stand in the content, as the class of an activation does
    among hyper-parameters, but cannot be called.

    Args:
        module: name of the module in the file, which may be that of Python 2.
        name: qualified name in the module.
        unread: receives the name if it is not on the list.
    """
    module, name = NAME_MAPPING.get((module, name), (module, name))
    module = IMPORT_MAPPING.get(module, module)
    if module == "torch.tensor":  # before torch 1.7
        module = "torch._tensor"
    known = GLOBALS.get((module, name))
    if known is not None:
        return known
    if module == "torch" and name in _CONSTANTS:
        return _CONSTANTS[name]
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return torch.UntypedStorage  # only compared, as the type in the identity of a storage
    full = f"{module}.{name}"
    if not _HARMLESS.fullmatch(full):
        unread.add(full)
        return Global(full)

    def leave(*args: Any, **kwargs: Any) -> Unread:
        unread.add(full)
        return Unread(full)

    return Global(full, leave, leave)


class RestrictedUnpickler(_Machine):  # type: ignore[misc]
    """Builds tensors, plain values and the records of torch.distributed.checkpoint.

    Attributes:
        unread: receives the names of the classes and functions that were left unread.
        room: bytes that storages may still take: as many as the file has, since storages are not
            compressed.
    """

    unread: set[str]
    room: float

    def __init__(
        self,
        file: BinaryIO,
        *,
        unread: set[str] | None = None,
        room: float = math.inf,
        encoding: str = "ASCII",
    ) -> None:
        super().__init__(file, encoding=encoding)
        self.unread = set() if unread is None else unread
        self.room = room
        self._storages: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for ``module.name``; nothing is imported."""
        if type(module) is not str or type(name) is not str:
            raise DamagedPickleError("a name that is no text")
        return find_global(module, name, self.unread)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = call_global(self.stack[-1], "call", args, {})

    def _new(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = call_global(self.stack[-1], "new", args, {})

    def _new_with_names(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = call_global(self.stack[-1], "new", args, kwargs)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) not in BUILDERS:
            raise ForbiddenPickleError(f"set the state of {describe_value(target)}")
        BUILDERS[type(target)](target, state)

    def _append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _appends(self) -> None:
        values = self.pop_mark()
        self._extend(self.stack[-1], values)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if type(target) in (list, deque):
            target.extend(values)
        elif type(target) is not Unread:
            raise ForbiddenPickleError(f"append to {describe_value(target)}")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_all(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        pairs = self.pop_mark()
        self._set_all(self.stack[-1], pairs)

    def _set_all(self, target: Any, pairs: list[Any]) -> None:
        if type(target) in (dict, OrderedDict, Counter, defaultdict):
            for key, item in _make_pairs(pairs):  # not by update(): that of a Counter adds
                target[key] = item
        elif type(target) is not Unread:
            raise ForbiddenPickleError(f"set entries of {describe_value(target)}")

    def _dict(self) -> None:
        pairs = self.pop_mark()  # which puts another stack in the place of this one
        self.append(dict(_make_pairs(pairs)))

    def _add_items(self) -> None:
        values = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise ForbiddenPickleError(f"add elements to {describe_value(self.stack[-1])}")
        self.stack[-1].update(map(as_key, values))

    def _frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(as_key, values)))

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))  # read() fails first if the file is shorter

    def _persistent(self) -> None:
        identity = self.stack.pop()
        if type(identity) is tuple and len(identity) == 4 and type(identity[1]) is Global:
            # The class of a module with its source, as torch wrote before its zip format.
            raise ForbiddenPickleError(f"call {describe_value(identity[1])}")
        self._require_storage(identity)
        self.append(self.persistent_load(identity))

    def _require_storage(self, identity: Any) -> None:
        """Raise unless ``identity`` describes a storage that is no larger than the file."""
        sound = type(identity) is tuple and len(identity) in (5, 6) and identity[:1] == ("storage",)
        if not sound:
            raise ForbiddenPickleError(f"load {describe_value(identity)} as a persistent object")
        _, kind, key, location, numel = identity[:5]
        if not (
            (isinstance(kind, StorageType) or kind is torch.UntypedStorage)
            and type(key) is str
            and type(location) is str
            and is_count(numel)
            and (len(identity) == 5 or identity[5] is None or _is_view(identity[5]))
        ):
            raise DamagedPickleError("a storage without a type, key, place or size")
        if key not in self._storages:
            self._storages.add(key)
            self.room -= numel * (kind.dtype.itemsize if isinstance(kind, StorageType) else 1)
        if self.room < 0:
            raise EOFError  # reported like any truncated file

    def _forbid(self, instruction: str) -> NoReturn:
        raise ForbiddenPickleError(f"use the pickle instruction {instruction}")

    dispatch: ClassVar[dict[int, Any]] = {
        **_Machine.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_with_names,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.BINPERSID[0]: _persistent,
        **{getattr(pickle, name)[0]: lambda self, name=name: self._forbid(name) for name in _CODE},
    }


def _make_pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return [(as_key(items[i]), items[i + 1]) for i in range(0, len(items), 2)]


def _is_view(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) == 3
        and type(value[0]) is str
        and all(map(is_count, value[1:]))
    )
