"""The numpy arrays and plain objects that modules hold beside tensors and containers."""

from __future__ import annotations

import sys
from abc import ABC
from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Generic, Protocol

import numpy as np
from torch import Tensor, nn

_HARMLESS_BASES = frozenset({object, ABC, Generic, Protocol, SimpleNamespace})
# Their objects are more than their attributes: locks, files, optimizers, functions, classes.
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
_MOST = 2**29  # bytes of arrays, and of tensors in plain objects, that are copied
_LONG = 100_000  # entries of a container in a plain object; a longer one is data


class PlainObjects:
    """The numpy arrays and plain objects among the things that modules hold.

    The attributes of plain objects are remembered, and the containers in them; objects in those
    containers are not. The rest is left alone once the bytes to copy pass 512 MB, and so are
    containers of more than 100 000 entries.

    Args:
        things: what attributes and containers of modules hold, without tensors and containers.
        seen: ids of the containers that are remembered elsewhere; those found here are added.

    Attributes:
        containers: the ``__dict__`` of each plain object, and every dict, list, set and deque
            within, each with a copy of what is in it.
        tensors: those in plain objects, without parameters.
        arrays: those that can be written, wherever they are.
    """

    def __init__(self, things: Iterable[Any], seen: set[int]) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[KeptArray] = []
        self._seen = seen
        self._left = _MOST
        within: list[Any] = []
        for thing in things:
            attributes = get_attributes(thing)
            if attributes is not None:
                within += self._remember_entries(attributes)
            elif is_array(thing):
                self._keep(thing)
        for thing in within:  # grows on the way
            if isinstance(thing, (dict, list, set, deque)):
                if len(thing) <= _LONG:
                    within += self._remember_entries(thing)
            elif is_array(thing) or (
                isinstance(thing, Tensor) and not isinstance(thing, nn.Parameter)
            ):
                self._keep(thing)

    def _remember_entries(self, container: Any) -> Iterable[Any]:
        """Remember a container, and return what is in it; nothing if it is remembered already."""
        if id(container) in self._seen:
            return ()
        self._seen.add(id(container))
        self.containers.append((container, container.copy()))
        return container.values() if isinstance(container, dict) else container

    def _keep(self, thing: Tensor | np.ndarray[Any, Any]) -> None:
        size = thing.numel() * thing.element_size() if isinstance(thing, Tensor) else thing.nbytes
        if id(thing) in self._seen or size > self._left:
            return
        self._seen.add(id(thing))
        self._left -= size
        if isinstance(thing, Tensor):
            self.tensors.append(thing)
        else:
            self.arrays.append(KeptArray(thing))


def get_attributes(thing: Any) -> dict[str, Any] | None:
    """Return the ``__dict__`` of a plain object, and None of anything else.

    An object is plain if its class is written in Python, outside the standard library, torch
    and numpy, and so are all its bases but `object`, `abc.ABC`, `typing.Generic` and
    `typing.Protocol`; or if it is a `types.SimpleNamespace`.
    """
    cls = type(thing)
    if cls.__module__ == "builtins" or not all(map(_is_harmless, cls.__mro__)):
        return None
    try:  # past a __getattribute__ of its own
        attributes = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
    return attributes if type(attributes) is dict else None


def _is_harmless(base: type) -> bool:
    return base in _HARMLESS_BASES or str(base.__module__).partition(".")[0] not in _FOREIGN


class KeptArray:
    """A numpy array and a copy of its content.

    Args:
        array: of any dtype. An array of objects is remembered element by element.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self._content = array.copy()

    def restore(self) -> None:
        """Put the content back in place, where a bit of it changed."""
        array, content = self._array, self._content
        is_writable = array.flags.writeable and array.shape == content.shape
        if is_writable and array.dtype == content.dtype and array.tobytes() != content.tobytes():
            np.copyto(array, content)


def is_array(thing: Any) -> bool:
    """Whether it is an array that a forward can write: no subclass, such as a file on disk."""
    return type(thing) is np.ndarray and thing.flags.writeable
