"""Edits of a module's containers, and their exact inverse.

A module is nothing but dictionaries and a class, so every change that freezing makes is
some keys taken out of a dictionary and some put in. The dictionary object itself stays:
hook handles and optimizers hold on to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

from torch import nn

Container = dict[Any, Any]


class Edits:
    """All changes of one block: planned first, applied together, undone together.

    Two copies of each dictionary that changes are kept: as it was, and as it will be. ::

        edits = Edits()
        edits.edit(module._buffers).pop("u")  # planned; the module is as before
        edits.apply()  # now the buffer is out
        edits.restore()  # and in again, at its old place
    """

    def __init__(self) -> None:
        self._planned: dict[int, tuple[Container, Container, Container]] = {}
        self._classes: dict[int, tuple[nn.Module, type, type]] = {}
        self._first: list[Callable[[], None]] = []
        self._restored: dict[int, Container] = {}

    def call_before_undoing(self, call: Callable[[], None]) -> None:
        """Plan a call that is made once, before anything is undone; the last planned is first."""
        self._first.append(call)

    def cancel(self) -> None:
        """Make the calls of `call_before_undoing`, and nothing else; the first error comes last."""
        errors = []
        while self._first:
            try:
                self._first.pop()()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def edit(self, target: Container) -> Container:
        """Return what ``target`` will hold once the edits are applied, to be changed."""
        planned = self._planned.get(id(target))
        if planned is None:
            planned = self._planned[id(target)] = target, target.copy(), target.copy()
        return planned[2]

    def remove(self, target: Container, keys: Iterable[Any]) -> None:
        """Plan to take ``keys`` out of ``target``, where they are there."""
        keys = set(keys)
        if keys.issuperset(target) and id(target) not in self._planned:
            if target:  # most of those that hold hooks or singular vectors
                self._planned[id(target)] = target, target.copy(), {}
            return
        content = self.edit(target)
        for key in keys:
            content.pop(key, None)

    def get_planned(self, target: Container) -> Container:
        """Return what ``target`` will hold once the edits are applied, to be looked at."""
        planned = self._planned.get(id(target))
        return target if planned is None else planned[2]

    def get_before(self, target: Container) -> Container:
        """Return what ``target`` held when its first edit was planned; what it holds if none is."""
        planned = self._planned.get(id(target))
        return target if planned is None else planned[1]

    def forget(self, target: Container, key: Any) -> None:
        """Take ``key`` out of ``target`` now, unless it was there before the edits."""
        planned = self._planned.get(id(target))
        if planned is None or key not in planned[1]:
            target.pop(key, None)

    def replan(self, target: Container, before: Container) -> None:
        """Plan that ``target``, which held ``before``, will hold what it holds now."""
        if id(target) in self._planned or not _is_same(target, before):
            self._planned[id(target)] = target, before.copy(), target.copy()

    def set_class(self, module: nn.Module, new: type, old: type | None = None) -> None:
        """Plan another class for this instance; the class itself may be shared by copies."""
        self._classes[id(module)] = (module, old or type(module), new)

    def list_classes(self) -> list[tuple[nn.Module, type, type]]:
        """Return the modules with the class from before and the planned one."""
        return list(self._classes.values())

    def get_planned_class(self, module: nn.Module) -> type:
        """Return the class that ``module`` will have once the edits are applied."""
        entry = self._classes.get(id(module))
        return type(module) if entry is None else entry[2]

    def apply(self) -> None:
        """Make the changes."""
        for target, _, after in self._planned.values():
            target.clear()
            if after:
                target.update(after)
        for module, _, new in self._classes.values():
            object.__setattr__(module, "__class__", new)

    def roll_back(self) -> None:
        """Undo an `apply` that may have stopped halfway: nobody else has changed anything."""
        self.cancel()
        for target, before, _ in self._planned.values():
            target.clear()
            target.update(before)
        self._restore_classes()

    def restore(self) -> None:
        """Undo `apply`, and keep what others have put in, taken out or replaced since.

        Can be repeated from any point where an interrupt stopped it.
        """
        self.cancel()
        restored = self._restored
        for target, before, after in self._planned.values():
            if not after and not target:
                target.update(before)  # most of them: nobody else has put anything in
                continue
            content = restored.get(id(target))
            if content is None:  # remembered, since it cannot be told from a cleared dictionary
                content = before if _is_same(target, after) else _merge(before, after, target)
                restored[id(target)] = content
            target.clear()
            target.update(content)
        self._restore_classes()

    def _restore_classes(self) -> None:
        for module, old, _ in self._classes.values():
            object.__setattr__(module, "__class__", old)


def _is_same(one: Container, other: Container) -> bool:
    """Whether both hold the same objects under the same keys, in the same order."""
    if len(one) != len(other):
        return False
    # By identity: tensors compare element by element.
    return not one or (list(one) == list(other) and all(map(is_, one.values(), other.values())))


def _merge(before: Container, after: Container, now: Container) -> Container:
    """Return ``before`` with what others have changed since it was made ``after``.

    Example: of ``{"u": 1, "bias": 2}``, ``{"weight": 3, "bias": 2}`` and
    ``{"weight": 4, "bias": 5, "scale": 6}`` it is ``{"u": 1, "bias": 5, "scale": 6}``.
    """
    merged = {}
    for key, value in before.items():
        if key not in after or after[key] is not value:
            merged[key] = value  # ours to put back, whatever happened to it
        elif key in now:
            merged[key] = now[key]
    for key, value in now.items():
        if key not in before and key not in after:
            merged[key] = value
    return merged
