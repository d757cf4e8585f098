"""Edits of a module's containers, and their exact inverse.

A module is nothing but dictionaries and a class, so every change that freezing makes is
some keys taken out of a dictionary and some put in. The dictionary object itself stays:
hook handles and optimizers hold on to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

Container = dict[Any, Any]


class Edit:
    """The planned change of one dictionary: keys to take out, items to put in."""

    __slots__ = ("added", "before", "before_others", "order", "removed", "restored", "target")

    def __init__(self, target: Container) -> None:
        self.target = target
        self.before = target.copy()
        self.removed: list[Any] = []
        self.added: Container = {}
        self.before_others: list[tuple[Any, Any]] | None = None  # a key, and one it stands before
        self.order: list[Any] | None = None  # of the keys while applied, where that matters
        self.restored: Container | None = None

    def remaining_keys(self) -> list[Any]:
        """Return the keys that will be there once the edit is applied."""
        removed, added = self.removed, self.added
        kept = [key for key in self.before if key not in removed]
        return kept + [key for key in added if key not in self.before or key in removed]

    def apply(self) -> None:
        """Change the dictionary."""
        target = self.target
        if not self.added and len(self.removed) == len(self.before):
            target.clear()
            return
        for key in self.removed:
            target.pop(key, None)
        if self.added:
            target.update(self.added)
            order = self.order
            if order is None and self.before_others:
                order = self._order_keys(self.before_others)
            if order is not None:
                content = {key: target[key] for key in order if key in target}
                _assign(target, {**content, **target})

    def _order_keys(self, pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
        order = list(self.target)
        for key, other in pairs:
            if other in self.target and order.index(key) > order.index(other):
                order.remove(key)
                order.insert(order.index(other), key)
        return order

    def restore(self) -> None:
        """Undo `apply`, and keep what others have put in, taken out or replaced since.

        Can be repeated from any point where an interrupt stopped it.
        """
        before, removed, added = self.before, self.removed, self.added
        count = len(removed)
        if not self.target and not added and count == len(before):
            self.target.update(before)  # most dictionaries of hooks and vectors
            return
        if (
            self.restored is None
            and self._keys_are_ours()
            and (not count or list(before)[-count:] == removed)
            and not (added and any(key in before for key in added))
        ):
            # Nothing came or went, and the keys stood at the end: putting them back there is
            # the old order.
            for key in added:
                self.target.pop(key, None)
            for key in removed:
                self.target[key] = before[key]
        else:
            if self.restored is None:
                self.restored = self._merge()
            _assign(self.target, self.restored)

    def _keys_are_ours(self) -> bool:
        # Loops, since this is asked for thousands of small dictionaries.
        now, removed, added = self.target, self.removed, self.added
        if len(now) != len(self.before) - len(removed) + len(added):
            return False
        for key in self.before:
            if key not in now and key not in removed:
                return False
        return added.keys() <= now.keys()

    def roll_back(self) -> None:
        """Undo an `apply` that may have stopped halfway: nobody else has changed anything."""
        _assign(self.target, self.before)

    def _merge(self) -> Container:
        merged = {}
        for key, value in self.before.items():
            if key in self.removed or key in self.added:
                merged[key] = value  # ours to put back, whatever happened to it
            elif key in self.target:
                merged[key] = self.target[key]
        for key, value in self.target.items():
            if key not in self.before and key not in self.added:
                merged[key] = value
        return merged


class Edits:
    """All changes of one block: planned first, applied together, undone together."""

    def __init__(self) -> None:
        self._edits: dict[int, Edit] = {}
        self._classes: dict[int, tuple[nn.Module, type, type]] = {}
        self._first: list[Callable[[], None]] = []

    def before_undoing(self, call: Callable[[], None]) -> None:
        """Plan a call that is made once, before anything is undone; the last planned is first."""
        self._first.append(call)

    def cancel(self) -> None:
        """Make the calls of `before_undoing`, and nothing else; the first error comes last."""
        errors = []
        while self._first:
            try:
                self._first.pop()()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def of(self, target: Container) -> Edit:
        """Return the one edit of ``target``; several tensors may share a dictionary."""
        edit = self._edits.get(id(target))
        if edit is None:
            edit = self._edits[id(target)] = Edit(target)
        return edit

    def forget(self, target: Container, key: Any) -> None:
        """Take ``key`` out of ``target`` now, unless it was there before the edits."""
        edit = self._edits.get(id(target))
        if edit is None or key not in edit.before:
            target.pop(key, None)

    def remove(self, target: Container, keys: Iterable[Any]) -> None:
        """Plan to take ``keys`` out of ``target``, where they are there."""
        edit = self.of(target)
        before, removed = edit.before, edit.removed
        for key in keys:
            if key in before and key not in removed:
                removed.append(key)

    def has(self, target: Container) -> bool:
        """Whether an edit of ``target`` is planned."""
        return id(target) in self._edits

    def set_class(self, module: nn.Module, new: type, old: type | None = None) -> None:
        """Plan another class for this instance; the class itself may be shared by copies."""
        self._classes[id(module)] = (module, old or type(module), new)

    def classes(self) -> list[tuple[nn.Module, type, type]]:
        """Return the modules with the class from before and the planned one."""
        return list(self._classes.values())

    def planned_class(self, module: nn.Module) -> type:
        """Return the class that ``module`` will have once the edits are applied."""
        entry = self._classes.get(id(module))
        return type(module) if entry is None else entry[2]

    def apply(self) -> None:
        """Make the changes."""
        for edit in self._edits.values():
            edit.apply()
        for module, _, new in self._classes.values():
            object.__setattr__(module, "__class__", new)

    def roll_back(self) -> None:
        """Undo an `apply` that may have stopped halfway."""
        self.cancel()
        for edit in self._edits.values():
            edit.roll_back()
        self._restore_classes()

    def restore(self) -> None:
        """Undo `apply`; safe to call again when interrupted."""
        self.cancel()
        for edit in self._edits.values():
            edit.restore()
        self._restore_classes()

    def _restore_classes(self) -> None:
        for module, old, _ in self._classes.values():
            object.__setattr__(module, "__class__", old)


def _assign(target: Container, content: Container) -> None:
    target.clear()
    target.update(content)
