"""What a checkpoint holds, and which part of it is the state dict that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import CheckpointError
from ..text import quote_names

_DEPTH = 4
# Where several fit equally badly, what these names hold is the network.
_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "params")


@dataclass(frozen=True)
class StateDict:
    """One state dict in a checkpoint.

    Attributes:
        path: keys that lead to it from the root of the checkpoint.
        tensors: names and tensors; extra states may be anything.
        versions: what `torch.nn.Module.state_dict` notes for each module, if it is there.
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
        format: of the file.
        content: everything in it; for safetensors the tensors alone, read when asked for.
        file_metadata: texts in the header of a safetensors file.
    """

    path: Path
    format: Literal["torch", "safetensors", "distributed"]
    content: Any
    file_metadata: Mapping[str, str] = field(default_factory=dict)

    def state_dicts(self) -> list[StateDict]:
        """Return every state dict in the checkpoint; an optimizer's state is none."""
        return list(_search(self.content, ()))

    def choose(self, key: str | None, fits: Callable[[StateDict], bool], wanted: str) -> StateDict:
        """Return the state dict under ``key``, or the one that fits.

        Args:
            key: keys that lead to it, joined by dots; None to find it.
            fits: whether one is what is wanted.
            wanted: what that is, for the message: ``"fits Critic"``.

        Raises:
            CheckpointError: if there is none, or several fit.
        """
        found = self.state_dicts()
        if not found:
            raise CheckpointError(f"'{self.path}' holds no state dict: {_describe(self.content)}")
        if key is not None:
            named = [one for one in found if one.key == key]
            if not named:
                raise CheckpointError(
                    f"'{self.path}' holds no state dict under '{key}'; it holds one under "
                    f"{quote_names(one.key for one in found)}"
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
                f"'{self.path}' holds {len(found)} state dicts, and none {wanted}; choose with "
                f"--key one of {quote_names(one.key for one in found)}"
            )
        raise CheckpointError(
            f"'{self.path}' holds {len(fitting)} state dicts, each of which {wanted}; choose "
            f"with --key one of {quote_names(one.key for one in fitting)}"
        )


def _search(node: Any, path: tuple[str, ...]) -> Iterator[StateDict]:
    if isinstance(node, nn.Module):  # pickled whole, and trusted
        node = node.state_dict()
    if not isinstance(node, Mapping) or "param_groups" in node or len(path) > _DEPTH:
        return
    inner = [
        found
        for name, value in node.items()
        if isinstance(name, str) and not name.endswith("_extra_state")
        for found in _search(value, (*path, name))
    ]
    if inner:
        yield from inner
    elif _is_state_dict(node):
        yield StateDict(path, node, getattr(node, "_metadata", None))


def _is_state_dict(node: Mapping[Any, Any]) -> bool:
    names = list(node)
    if not names or not all(isinstance(name, str) for name in names):
        return False
    # A lazy mapping holds tensors only; asking for one would read it.
    return not isinstance(node, dict) or any(isinstance(v, Tensor) for v in node.values())


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"its keys are {quote_names(map(str, content))}" if content else "it holds nothing"
    return f"it holds a {type(content).__name__}"
