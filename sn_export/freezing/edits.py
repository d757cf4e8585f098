"""Edits of a module's containers, and their exact inverse.

A module is nothing but dictionaries and a class, so every change that freezing makes is
some keys taken out of a dictionary and some put in. The dictionary object itself stays:
hook handles and optimizers hold on to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
        self._attributes: dict[int, tuple[Container, Container, str]] = {}
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
            if id(target) in self._attributes:
                del planned[2][self._attributes.pop(id(target))[2]]
        return planned[2]

    def remove(self, target: Container, keys: Collection[Any]) -> None:
        """Plan to take ``keys`` out of ``target``, where they are there."""
        if id(target) not in self._planned and all(map(keys.__contains__, target)):
            if target:  # most of those that hold hooks or singular vectors
                self._planned[id(target)] = target, target.copy(), {}
            return
        content = self.edit(target)
        for key in keys:
            content.pop(key, None)

    def remove_attribute(self, attributes: Container, name: str) -> None:
        """Plan to take ``name`` out of a module's attributes, where it is there.

        The last one, as a hook's weight is, goes and comes back with no other touched.
        """
        if id(attributes) in self._planned or next(reversed(attributes)) != name:
            self.remove(attributes, (name,))
        else:
            self._attributes[id(attributes)] = attributes, attributes.copy(), name

    def get_planned(self, target: Container) -> Container:
        """Return what ``target`` will hold once the edits are applied, to be looked at."""
        if id(target) in self._attributes:
            return self.edit(target)
        planned = self._planned.get(id(target))
        return target if planned is None else planned[2]

    def get_before(self, target: Container) -> Container:
        """Return what ``target`` held when its first edit was planned; what it holds if none is."""
        planned = self._planned.get(id(target)) or self._attributes.get(id(target))
        return target if planned is None else planned[1]

    def forget(self, target: Container, key: Any) -> None:
        """Take ``key`` out of ``target`` now, unless it was there before the edits."""
        before = self.get_before(target)
        if before is target or key not in before:
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
        for attributes, _, name in self._attributes.values():
            del attributes[name]
        for module, _, new in self._classes.values():
            object.__setattr__(module, "__class__", new)

    def roll_back(self) -> None:
        """Undo an `apply` that may have stopped halfway: nobody else has changed anything."""
        self.cancel()
        for target, before, _ in (*self._planned.values(), *self._attributes.values()):
            target.clear()
            target.update(before)
        self._restore_classes()

    def restore(self) -> None:
        """Undo `apply`, and keep what others have put in, taken out or replaced since.

        Can be repeated from any point where an interrupt stopped it.
        """
        self.cancel()
        for target, before, after in self._planned.values():
            if after or target:
                self._fill(target, before, after)
            else:  # most of them: nobody else has put anything in
                for key, value in before.items():  # twice as fast as `OrderedDict.update`
                    target[key] = value
        for attributes, before, name in self._attributes.values():
            last = next(reversed(attributes), None)
            if last == name and attributes[name] is before[name]:
                continue  # restored before
            names = reversed(before)
            next(names)
            if last == next(names, None):  # nobody else has set anything
                attributes[name] = before[name]
            else:
                after = {key: value for key, value in before.items() if key != name}
                self._fill(attributes, before, after)
        self._restore_classes()

    def _fill(self, target: Container, before: Container, after: Container) -> None:
        """Restore what ``target`` held, and remember it: a cleared dictionary does not tell."""
        content = self._restored.get(id(target))
        if content is None:
            content = before if _is_same(target, after) else _merge(before, after, target)
            self._restored[id(target)] = content
        target.clear()
        target.update(content)

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
