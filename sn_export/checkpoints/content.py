"""The content of a checkpoint, and the search for the state dict in it that a caller wants."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import CheckpointError
from ..text import describe_type, format_count, quote_name, quote_names, shorten_list
from .lazy_tensors import LazyTensors, is_tensor
from .pickle_globals import Global, Unread

_DEPTH = 6  # of keys that lead to a state dict
_MOST = 100  # state dicts that are returned, and items of a list that are searched
_LISTS = (list, tuple, set, frozenset, deque)
# How deep containers may lie in others, and how many ways may lead to them, and to each of many.
_NESTED, _WAYS, _WAYS_TO_EACH = 100, 2**22, 100
# If no state dict fits, the one under such a key is taken for the network.
_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "params")


@dataclass(frozen=True)
class StateDict:
    """One state dict in a checkpoint.

    Attributes:
        path: keys that lead to it from the root of the checkpoint.
        tensors: tensors by name; the value of an extra state may be anything.
        versions: the versions of the modules that `torch.nn.Module.state_dict` adds as
            ``_metadata``; None if they were not saved.
    """

    path: tuple[str, ...]
    tensors: Mapping[str, Any]
    versions: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """The path as ``--key`` takes it; ``""`` for the root."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: the file or folder.
        format: the format of the file.
        content: everything in it; tensors of safetensors and distributed checkpoints are read
            when they are accessed.
        file_metadata: texts in the header of a safetensors file.
        notes: sentences about what was left unread.
    """

    path: Path
    format: Literal["torch", "safetensors", "distributed", "numpy"]
    content: Any
    file_metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def state_dicts(self) -> list[StateDict]:
        """Return the state dicts in the checkpoint, at most a hundred.

        An optimizer's state is left out. A state dict that is stored under several keys is returned
        once for each.
        """
        return list(islice(_search(self.content, (), {}), _MOST))

    def choose(
        self,
        key: str | None,
        fits: Callable[[StateDict], bool],
        wanted: str,
        describe: Callable[[StateDict], str] = lambda one: "",
    ) -> StateDict:
        """Return the state dict under ``key``, or the one that fits.

        Args:
            key: keys that lead to it, joined by dots; None to search for it.
            fits: whether a state dict is one that the caller wants.
            wanted: the same in words, for the message: ``"fits Critic"``.
            describe: returns a remark on a candidate, which the message shows.

        Raises:
            CheckpointError: if there is none, or several fit.
        """
        found = self.state_dicts()
        what = quote_name(self.path)
        if not found:
            raise CheckpointError(f"{what} holds no state dict: {_describe_content(self.content)}")

        def candidates(of: Iterable[StateDict]) -> str:
            return describe_candidates(of, describe)

        if key is not None:
            named = [one for one in found if one.key == key] or list(_follow_key(self.content, key))
            if not named:
                near = get_close_matches(key, [one.key for one in found], 1)
                raise CheckpointError(
                    f"{what} holds no state dict under {quote_name(key)}"
                    + (f" (did you mean {quote_name(near[0])}?)" if near else "")
                    + f"; it holds one under {candidates(found)}"
                )
            return named[0]
        if len(found) == 1:
            return found[0]
        fitting = [one for one in found if fits(one)]
        if len(fitting) == 1:
            return fitting[0]
        usual = [one for one in found if one.path and one.path[-1] in _USUAL]
        if not fitting and len(usual) == 1:
            return usual[0]
        if not fitting:
            raise CheckpointError(
                f"{what} holds {len(found)} state dicts, and none {wanted}; choose with --key one "
                f"of {candidates(found)}"
            )
        raise CheckpointError(
            f"{what} holds {len(fitting)} state dicts, each of which {wanted}; choose with --key "
            f"one of {candidates(fitting)}"
        )


def _search(node: Any, path: tuple[str, ...], barren: dict[int, int]) -> Iterator[StateDict]:
    """Yield the state dicts in ``node``.

    Args:
        node: any value of a checkpoint.
        path: keys that led to it.
        barren: the length of the shortest path to each object, by its id, that holds no state
            dict. These objects are not searched again: twenty mappings, each of which is stored
            twice in the one before, have a million paths.
    """
    mapping = as_mapping(node)
    if mapping is None or "param_groups" in mapping or len(path) > _DEPTH:
        return
    if barren.get(id(node), _DEPTH + 1) <= len(path):
        return
    is_barren = True
    for name, value in _list_inner(mapping):
        for found in _search(value, (*path, name), barren):
            is_barren = False
            yield found
    if not is_barren:
        return
    if _is_state_dict(mapping) and not isinstance(node, (list, tuple)):
        yield StateDict(path, mapping, getattr(mapping, "_metadata", None))
    else:
        barren[id(node)] = len(path)


def as_mapping(node: Any) -> Mapping[Any, Any] | None:
    """Return ``node`` as a mapping with str keys, or None if it can hold no state dict.

    A module becomes its state dict, and a list a mapping of its positions: ``[a]`` is ``{"0": a}``.
    """
    if isinstance(node, nn.Module):  # pickled whole, and trusted
        return node.state_dict()
    if isinstance(node, (list, tuple)):
        return {str(number): item for number, item in enumerate(node[:_MOST])}
    if type(node) is dict and any(type(name) is int for name in node):
        return {str(name): value for name, value in islice(node.items(), _MOST)}
    return node if isinstance(node, Mapping) else None


def _list_inner(node: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    values = node.others if isinstance(node, LazyTensors) else node
    for name, value in values.items():
        if isinstance(name, str) and not name.endswith("_extra_state"):
            yield name, value


def _follow_key(node: Any, key: str) -> Iterator[StateDict]:
    """Yield each state dict that ``key`` can lead to: a single key may itself have dots.

    Example: ``"net.0"`` leads to ``{"net": {"0": state}}`` and to ``{"net.0": state}``.
    """
    places: list[tuple[Any, tuple[str, ...], str]] = [(node, (), key)]
    while places:
        node, path, rest = places.pop()
        mapping = as_mapping(node)
        if mapping is None or len(path) > _DEPTH:
            continue
        if not rest and _is_state_dict(mapping) and not isinstance(node, (list, tuple)):
            yield StateDict(path, mapping, getattr(mapping, "_metadata", None))
        for name, value in _list_inner(mapping):
            if rest == name or rest.startswith(f"{name}."):
                places.append((value, (*path, name), rest[len(name) + 1 :]))


def _is_state_dict(node: Mapping[Any, Any]) -> bool:
    if isinstance(node, LazyTensors):
        return bool(node.specs)
    names = list(node)
    if not names or not all(isinstance(name, str) for name in names):
        return False
    return any(isinstance(value, Tensor) for value in node.values())


def describe_candidates(states: Iterable[StateDict], describe: Callable[[StateDict], str]) -> str:
    """Return the key of each state dict, with its number of tensors and the text of ``describe``.

    Example::

        describe_candidates([generator], lambda one: "")  # "'generator' (7 tensors)"
    """
    texts = []
    for one in states:
        count = sum(is_tensor(one.tensors, name) for name in one.tensors)
        said = [format_count(count, "tensor"), describe(one)]
        texts.append(f"{quote_name(one.key)} ({', '.join(filter(None, said))})")
    return shorten_list(texts, 20)


def _describe_content(content: Any) -> str:
    if isinstance(content, (Unread, Global)):
        return f"it holds {quote_name(content.name)}, which was left unread"
    if isinstance(content, Mapping):
        arrays = [name for name, value in content.items() if _is_array(value)]
        if arrays:
            found = format_count(len(arrays), "numpy array")
            names = quote_names(arrays, 3)
            return f"it holds {found} ({names}); write a .npz with numpy.savez instead"
        return f"its keys are {quote_names(content)}" if content else "it holds nothing"
    if isinstance(content, (list, tuple)) and any(isinstance(v, Tensor) for v in content):
        return "it holds tensors without names"
    return f"it holds {describe_type(content)}"


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numpy, or the placeholder of one that was left unread."""
    if isinstance(value, Unread):
        return value.name.startswith("numpy.") and value.name.endswith(("_reconstruct", "buffer"))
    return type(value).__name__ == "ndarray"


def require_serializable(content: Any, what: str) -> None:
    """Raise if ``content`` holds what was left unread, or lies too deep, to be written again.

    Whoever writes it goes down to each value, by each way that leads there: thirty lists, each of
    which holds the one before twice, have a billion ways.

    Args:
        content: the content of a checkpoint, or a part of it.
        what: its name in the message.

    Raises:
        CheckpointError: naming the class or function that was left unread, or the nesting.
    """
    measured: dict[int, tuple[int, int]] = {}  # of each container, its depth and the ways into it
    begun, waiting = set[int](), [content]
    while waiting:
        node = waiting[-1]
        if id(node) in measured:
            waiting.pop()
            continue
        inner = _list_containers(node, what)
        missing = {id(one): one for one in inner if id(one) not in measured}
        if missing and id(node) in begun:  # it waits for what it is in
            raise _report_nesting(what, "in themselves")
        begun.add(id(node))
        waiting += missing.values()
        if not missing:
            depth = 1 + max((measured[id(one)][0] for one in inner), default=0)
            if depth > _NESTED:
                raise _report_nesting(what, f"more than {_NESTED} levels deep")
            measured[id(node)] = depth, 1 + sum(measured[id(one)][1] for one in inner)
    if measured[id(content)][1] > max(_WAYS, _WAYS_TO_EACH * len(measured)):
        raise _report_nesting(what, "in each other too many times")


def _list_containers(node: Any, what: str) -> list[Any]:
    """Return the containers in ``node``; raise for a value that was left unread."""
    inner = [node]
    if isinstance(node, Mapping):
        inner = [*(node.others if isinstance(node, LazyTensors) else node).values(), *node]
    elif isinstance(node, _LISTS):
        inner = [*node]
    for one in inner:
        if isinstance(one, (Unread, Global)):
            raise CheckpointError(
                f"{what} also holds {quote_name(one.name)}, which was left unread and "
                "cannot be written again; leave out all but the state dict with --weights-only, "
                "or read everything with --trust-pickle if you trust its origin"
            )
    return [one for one in inner if isinstance(one, (*_LISTS, Mapping))]


def _report_nesting(what: str, how: str) -> CheckpointError:
    return CheckpointError(f"{what} holds values that lie {how}, which cannot be written again")


def replace_at(node: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return a copy of ``node`` with ``value`` at ``path``; ``node`` itself is not changed.

    Example::

        replace_at({"models": [a, b], "step": 3}, ("models", "1"), c)
        # {"models": [a, c], "step": 3}
    """
    if not path:
        return value
    if isinstance(node, (list, tuple)):
        number = int(path[0])
        items = [*node[:number], replace_at(node[number], path[1:], value), *node[number + 1 :]]
        return items if isinstance(node, list) else tuple(items)
    key = next(name for name in node if str(name) == path[0])
    inner = replace_at(node[key], path[1:], value)
    if isinstance(node, LazyTensors):
        return LazyTensors(node.specs, node.__getitem__, {**node.others, key: inner})
    changed = copy.copy(node)
    changed[key] = inner
    return changed


def read_all(node: Any) -> Any:
    """Return ``node`` with every lazy tensor read into memory."""
    if isinstance(node, LazyTensors):
        # Cloned: the file may be written to while its mapped memory is read.
        tensors = {name: node[name].clone() for name in node.specs}
        return tensors | {name: read_all(value) for name, value in node.others.items()}
    if type(node) is dict:
        return {name: read_all(value) for name, value in node.items()} if _is_lazy(node) else node
    if type(node) is list:
        return [read_all(value) for value in node] if _is_lazy(node) else node
    return node


def _is_lazy(node: Any) -> bool:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return isinstance(node, LazyTensors) or any(map(_is_lazy, values))
