"""From one spelling to another, file to file; what is no spectral norm stays as it is."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import disk_errors_as, drafts, publish, require_place
from ..text import quote_name, quote_names
from .content import Checkpoint, StateDict, as_mapping, read_all, replace_at, require_read
from .dims import require_fitting
from .lazy_tensors import LazyTensors
from .read import read_checkpoint
from .safetensors_file import write_safetensors
from .spelling import Respelled, respell
from .stored_norms import Spelling, StoredNorm, find_sites, handwritten_notes

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` made.

    Attributes:
        files: the files written.
        key: where in the checkpoint the state dict is.
        found: every tensor under spectral norm.
        changed: those that were spelled differently.
        notes: what else there is to say, such as keys that look like handwritten spectral norm.
    """

    files: tuple[Path, ...]
    key: str
    found: tuple[StoredNorm, ...]
    changed: tuple[StoredNorm, ...]
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Spelling,
    *,
    key: str | None = None,
    weights_only: bool = False,
    dims: Mapping[str, int] | None = None,
    max_shard_size: int | None = None,
    trust_pickle: bool = False,
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> Conversion:
    """Write a checkpoint with its spectral norms spelled as ``to``, without model code.

    ::

        convert_checkpoint("critic.pt", "plain.safetensors", "plain", weights_only=True)

    A plain network that loads the result computes, bit for bit, what the network under
    spectral norm computes in eval mode. From safetensors to safetensors one tensor at a
    time is in memory. Files appear together once all are written, or none does.

    Args:
        path: the checkpoint, see `read_checkpoint`.
        target: the file to write, ``.safetensors`` or torch's ``.pt``, ``.pth``, ``.ckpt``.
        to: ``"plain"``, ``"hook"`` or ``"parametrization"``.
        key: where in the checkpoint the state dict is, if several have spectral norm.
        weights_only: write the state dict alone, and leave out what else is there.
        dims: dims of square weights by name, where their vectors cannot tell.
        max_shard_size: bytes for each safetensors file; with more of them there is an index.
        trust_pickle: see `read_checkpoint`.
        progress: called with the name of each tensor written and how many there will be.

    Raises:
        CheckpointError: if the checkpoint cannot be read, spelled so or written. What was
            at ``target`` is untouched then.
    """
    destination = Path(target)
    if destination.suffix not in _SUFFIXES:
        raise CheckpointError(
            f"cannot write '{destination}': it must end in {', '.join(_SUFFIXES[:-1])} or "
            f"{_SUFFIXES[-1]}"
        )
    with disk_errors_as(CheckpointError, destination):
        require_place(destination)
    is_torch = destination.suffix != ".safetensors"
    if max_shard_size is not None and is_torch:
        raise CheckpointError(f"only safetensors can be sharded, and '{destination}' is not")
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    state = checkpoint.choose(
        key, lambda one: bool(find_sites(one.tensors)), "has spectral norm in it"
    )
    found = tuple(find_sites(state.tensors))
    notes = handwritten_notes(state.tensors)
    if not found:
        raise CheckpointError(
            f"'{checkpoint.path}' holds no spectral norm to convert: no 'weight_orig' with "
            "'weight_u', no 'parametrizations.weight.original' with '0._u'"
            + "".join(f". {n}" for n in notes)
        )
    require_fitting(dims or {}, found, state.tensors)
    result = respell(state, to, dims)
    count = len(result.entries)

    def written(name: str) -> None:
        progress(name, count)

    with disk_errors_as(CheckpointError, destination), drafts(destination) as draft:
        if is_torch:
            made = [draft]
            _save(_content(checkpoint, state, result, weights_only, written), draft)
        else:
            _require_tensors_only(checkpoint, state, weights_only, destination)
            made = write_safetensors(
                draft.parent,
                draft.name,
                result.entries,
                checkpoint.file_metadata,
                max_shard_size,
                written,
            )
        _require_unambiguous(destination, made)
        files = tuple(destination.with_name(file.name) for file in made)
        publish(list(zip(made, files, strict=True)))
    return Conversion(files, state.key, found, result.changed, notes)


def _content(
    checkpoint: Checkpoint,
    state: StateDict,
    result: Respelled,
    weights_only: bool,
    written: Callable[[str], None],
) -> Any:
    tensors: dict[str, Any] = OrderedDict() if result.versions is not None else {}
    for name, entry in result.entries.items():
        tensors[name] = entry.read()
        if isinstance(state.tensors, LazyTensors) and entry.spec is not None:
            tensors[name] = tensors[name].clone()  # not to be torn by whoever writes the file
        written(name)
    if result.versions is not None:
        tensors._metadata = result.versions  # type: ignore[attr-defined]
    require_read(tensors, f"the state dict in {quote_name(checkpoint.path)}")
    if weights_only or not state.path:
        return tensors
    content = replace_at(checkpoint.content, state.path, tensors)
    require_read(content, quote_name(checkpoint.path))
    return read_all(content)


def _save(content: Any, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # what its C++ writer makes of a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise OSError(0, "the disk is full, or the file was cut off") from error


def _require_tensors_only(
    checkpoint: Checkpoint, state: StateDict, weights_only: bool, target: Path
) -> None:
    if weights_only or not state.path:
        return
    node, others = as_mapping(checkpoint.content) or {}, []
    for number, name in enumerate(state.path):
        others += [".".join((*state.path[:number], str(k))) for k in node if k != name]
        node = as_mapping(node[name]) or {}
    if others:
        raise CheckpointError(
            f"'{target.name}' can hold tensors only, and '{checkpoint.path}' also holds "
            f"{quote_names(others)}; leave them out with --weights-only, or write a .pt"
        )


def _require_unambiguous(target: Path, made: list[Path]) -> None:
    # A reader takes the single file or the index; one of them would be an old one.
    index = target.with_name(f"{target.name}.index.json")
    stale = index if len(made) == 1 else target
    if target.suffix == ".safetensors" and stale.exists():
        raise CheckpointError(
            f"'{stale}' is there and would contradict the new "
            f"{'file' if len(made) == 1 else 'shards'}; remove it or choose another name"
        )
