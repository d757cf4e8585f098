"""Copies of tensors that are made when something writes to them, and not before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
)


class Watch(TorchDispatchMode):
    """From `start` to `stop`, calls back before the first write to the memory of a tensor.

    It sees every operator that torch dispatches, in eager and scripted code, and nothing that
    writes past torch, such as numpy.

    Args:
        watched: tensors, each with what is called before its memory is first written.
    """

    def __init__(self, watched: Iterable[tuple[Tensor, Callable[[], None]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: dict[int, list[Callable[[], None]]] = {}
        for tensor, call in watched:
            self._calls.setdefault(_memory(tensor), []).append(call)

    def start(self) -> None:
        """Watch from here on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Watch no more; can be repeated from any point where it was interrupted."""
        if not any(mode is self for mode in _get_current_dispatch_mode_stack()):
            return
        try:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        except IndexError:  # what `__exit__` takes first is gone: it was interrupted behind that
            _pop_mode()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[position] if position < len(args) else kwargs.get(argument.name)
                    self._before_write(value)
        return func(*args, **kwargs)

    def _before_write(self, value: Any) -> None:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                for call in self._calls.pop(_memory(leaf), ()):
                    call()


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensor subclasses without memory of their own
        return 0
