"""How tensors lie in memory, and copies of them.

A copy shares memory with other copies wherever the originals do. A `Watch` copies a tensor when
something writes to it, and not before. A large model is treated in ways that need less memory, and
more time or room on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_private import TorchDispatchMode, dispatch_modes, pop_dispatch_mode, pytree

LARGE = 2**29  # bytes of weights, past which a model is a large one

_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_BY_COLUMN = (torch.sparse_csc, torch.sparse_bsc)
_ALIGNMENT = 16  # bytes of the widest element: a view starts at a multiple of its dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie one by one in memory, as a file can hold them."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def list_dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return dense tensors that hold, together, every value of ``tensor``.

    A dense tensor is its only part; a sparse one gives its indices and its values.
    """
    if tensor.is_nested:
        return [*tensor.unbind()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _BY_ROW:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in _BY_COLUMN:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor] if is_dense(tensor) else [tensor.to_dense()]


def as_real_pairs(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a file has it: real and imaginary parts in a last dimension of 2.

    As `torch.view_as_real`; any other tensor is returned as it is::

        as_real_pairs(torch.zeros(4, 8, dtype=torch.complex64))  # float32, shape (4, 8, 2)
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_large(size: int) -> bool:
    """Whether ``size`` bytes of weights are those of a large model."""
    return size > LARGE


def are_large(tensors: Iterable[Tensor]) -> bool:
    """Whether ``tensors`` take, together, as many bytes as those of a large model."""
    return is_large(sum(part.nbytes for tensor in tensors for part in list_dense_parts(tensor)))


class Copies:
    """Copies of tensors to write to, as often as needed from the old content.

    A tensor that shares no byte with another one is cloned. Those that do, as views of each
    other, are laid over one copy of the bytes that they span: a write to one is read in the others.

    Args:
        tensors: of any dtype and device. Nothing is written to them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.of: dict[int, Tensor] = {}  # id of an original -> its copy
        self._pairs: list[tuple[Tensor, Tensor]] = []  # a copy, and what it is a copy of
        self._views: list[tuple[Tensor, Tensor]] = []  # a copy, and the memory that it lies on
        originals = {id(tensor): tensor for tensor in tensors}
        for group in _group_by_memory(originals.values()):
            if len(group) > 1:
                self._copy_together(group)
        for key, tensor in originals.items():
            if key not in self.of:
                copy = self.of[key] = tensor.detach().clone()
                self._pairs.append((copy, tensor))

    def _copy_together(self, group: list[Tensor]) -> None:
        start = min(_find_first_byte(tensor) for tensor in group) // _ALIGNMENT * _ALIGNMENT
        stop = max(_find_end(tensor) for tensor in group)
        span = torch.empty(0, dtype=torch.uint8, device=group[0].device)
        span.set_(group[0].untyped_storage(), start, (stop - start,), (1,))
        content = span.clone()
        self._pairs.append((content, span))
        for tensor in group:
            offset = (_find_first_byte(tensor) - start) // tensor.itemsize
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            view.set_(content.untyped_storage(), offset, tensor.shape, tensor.stride())
            self.of[id(tensor)] = view
            self._views.append((view, view.detach()))

    def reset(self) -> None:
        """Give every copy the content of its original again."""
        with torch.no_grad():
            for copy, original in self._pairs:
                if not have_same_bits(copy, original):
                    copy.copy_(original)
            for view, memory in self._views:
                if not is_in_place(view, memory):
                    view.data = memory


def find_on_memory_of(fixed: Iterable[Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the ``tensors`` that share a byte with one of ``fixed``, directly or by another."""
    aliases = {id(alias): alias for alias in (tensor.detach() for tensor in fixed)}
    others = {id(tensor): tensor for tensor in tensors}
    return [
        tensor
        for group in _group_by_memory([*aliases.values(), *others.values()])
        if any(id(tensor) in aliases for tensor in group)
        for tensor in group
        if id(tensor) in others
    ]


def is_in_place(tensor: Tensor, memory: Tensor) -> bool:
    """Whether ``tensor`` still lies on ``memory``, with its dtype and shape.

    True for a tensor that is not dense, since that has no memory of its own.
    """
    if not (is_dense(tensor) and is_dense(memory)):
        return True
    return (tensor.dtype, tensor.shape, tensor.data_ptr()) == (
        memory.dtype,
        memory.shape,
        memory.data_ptr(),
    )


def have_same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit; on the meta device they do."""
    if left.is_meta or right.is_meta:
        return True
    if left.dtype != right.dtype or left.is_nested != right.is_nested:
        return False
    if not left.is_nested and left.shape != right.shape:  # nested tensors have none
        return False
    parts, others = list_dense_parts(left), list_dense_parts(right)
    return len(parts) == len(others) and all(map(_are_same, parts, others))


def _are_same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    bits = [_view_bits(left), _view_bits(right)]
    if all(one.numel() % 8 == 0 and one.storage_offset() % 8 == 0 for one in bits):
        bits = [one.view(torch.int64) for one in bits]  # compared seven times as fast
    return torch.equal(*bits)


def _view_bits(tensor: Tensor) -> Tensor:
    # NaN equals itself bit for bit.
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.resolve_neg().contiguous().flatten().view(torch.uint8)


def _group_by_memory(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups: in each, every tensor shares a byte with another."""
    storages: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in tensors:
        if _has_plain_memory(tensor):
            key = (tensor.device, tensor.untyped_storage().data_ptr())
            storages.setdefault(key, []).append(tensor)
    for group in storages.values():
        group.sort(key=_find_first_byte)
        together, end = group[:1], _find_end(group[0])
        for tensor in group[1:]:
            if _find_first_byte(tensor) >= end:
                yield together
                together = []
            together.append(tensor)
            end = max(end, _find_end(tensor))
        yield together


def _has_plain_memory(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and is_dense(tensor)
        and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def _find_first_byte(tensor: Tensor) -> int:
    """The first byte of the tensor in its storage."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _find_end(tensor: Tensor) -> int:
    """The byte after its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return _find_first_byte(tensor) + (last + 1) * tensor.itemsize


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
            self._calls.setdefault(_get_address(tensor), []).append(call)

    def start(self) -> None:
        """Watch from here on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Watch no more; can be repeated from any point where it was interrupted."""
        if not any(mode is self for mode in dispatch_modes()):
            return
        try:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        except IndexError:  # an interrupted `__exit__` has popped its entry, and not the mode
            pop_dispatch_mode()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in find_written(func, args, kwargs):
                for call in self._calls.pop(_get_address(tensor), ()):
                    call()
        return func(*args, **kwargs)


def find_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _get_address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensor subclasses without memory of their own
        return 0
