"""Convert a file from one spelling to another; what is not reparametrized stays as it is."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import (
    Drafts,
    disk_errors_as,
    publish,
    require_folder_place,
    require_place,
)
from ..results import OrthogonalMap, Respellable
from ..text import quote_name, quote_names
from .content import Checkpoint, StateDict, as_mapping, read_all, replace_at, require_serializable
from .distributed import write_distributed
from .kinds import describe_assumed_dims
from .lazy_tensors import LazyTensors
from .read import read_checkpoint
from .reparametrizations import (
    UNKNOWN_MAP,
    Reparametrization,
    Spelling,
    describe_handwritten_norms,
    find_handwritten_norms,
    find_reparametrizations,
)
from .safetensors_file import (
    find_stale_shards,
    name_shard,
    require_unambiguous,
    write_safetensors,
)
from .spectral_norm import describe_lengths
from .spelling import Respelled, require_fitting, respell
from .torch_file import write_torch_file

_LOOKED_FOR: dict[Respellable, str] = {
    "spectral_norm": "no 'weight_orig' with 'weight_u', no 'parametrizations.weight.original' with "
    "'0._u'",
    "weight_norm": "no 'weight_g' with 'weight_v', no 'parametrizations.weight.original0' with "
    "'original1'",
}

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` made.

    Attributes:
        files: the files written, or the folder.
        key: where in the checkpoint the state dict is.
        found: every reparametrized tensor that was chosen to be respelled.
        changed: those of them whose spelling was another one.
        notes: further remarks, such as keys that look like handwritten spectral norm, or tensors
            that ``only`` left as they were.
    """

    files: tuple[Path, ...]
    key: str
    found: tuple[Reparametrization, ...]
    changed: tuple[Reparametrization, ...]
    notes: tuple[str, ...]


def convert_checkpoint(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Spelling,
    *,
    only: Respellable | None = None,
    key: str | None = None,
    weights_only: bool = False,
    dims: Mapping[str, int] | None = None,
    orthogonal_map: OrthogonalMap | None = None,
    max_shard_size: int | None = None,
    trust_pickle: bool = False,
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> Conversion:
    """Write a checkpoint with its reparametrizations spelled as ``to``, without model code.

    ::

        convert_checkpoint("critic.pt", "plain.safetensors", "plain", weights_only=True)

    A plain network that loads the result computes, bit for bit, what the reparametrized
    network computes in eval mode. Between safetensors and distributed folders one tensor at a time
    is in memory. All files appear together once they are written, or none of them.

    Args:
        path: the checkpoint, see `read_checkpoint`.
        target: the file to write, ``.safetensors`` or torch's ``.pt``, ``.pth``, ``.ckpt``. Where
            a folder was read, of torch.distributed.checkpoint or of safetensors, any other name
            is that of a new folder of the same kind, from which a sharded run can go on.
        to: ``"plain"``, ``"hook"`` or ``"parametrization"``.
        only: respell spectral norm or weight norm alone, and leave others as they are.
        key: where in the checkpoint the state dict is, if several are reparametrized.
        weights_only: write the state dict alone, and leave out what else is there.
        dims: dims by name of the tensor, which the file alone does not tell.
        orthogonal_map: the map of torch's orthogonal parametrizations, which no file holds.
            ``"default"`` is torch's default: ``"matrix_exp"`` for square or complex weights,
            ``"householder"`` for others.
        max_shard_size: bytes of each safetensors file at most; several files have an index. The
            shards of an index that is replaced are removed.
        trust_pickle: see `read_checkpoint`.
        progress: called with the name of each tensor written and how many there will be.

    Raises:
        CheckpointError: if the checkpoint cannot be read or written, or a tensor has no such
            spelling, which the message names. What was at ``target`` is unchanged then.
    """
    destination = Path(target)
    is_folder = _require_target(destination, Path(path), max_shard_size)
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    if is_folder and checkpoint.format == "torch":
        raise _report_unknown_target(destination)
    state = checkpoint.choose(
        key, lambda one: bool(_choose_sites(one, only)[0]), f"has {_name_kind(only)} in it"
    )
    found, left = _choose_sites(state, only)
    found = _set_map(found, orthogonal_map)
    notes = describe_handwritten_norms(state.tensors)
    if not found:
        raise CheckpointError(". ".join((_describe_absence(checkpoint, only), *notes)))
    require_fitting(dims or {}, found, state.tensors)
    result = _respell_all(state, found, to, only, dims)
    notes += checkpoint.notes + _describe_rest(found, left, state.tensors, dims or {})
    count = len(result.entries)

    def written(name: str) -> None:
        progress(name, count)

    with disk_errors_as(CheckpointError, destination), Drafts() as drafts:
        draft = drafts.open(destination)
        made = _write(checkpoint, state, result, weights_only, draft, max_shard_size, written)
        require_unambiguous(destination, made)
        files = tuple(destination.with_name(file.name) for file in made)
        stale = find_stale_shards(files)
        publish(list(zip(made, files, strict=True)), stale)
    if stale:
        names = quote_names(path.name for path in stale)
        notes += (f"removed, as the new index names other shards: {names}",)
    return Conversion(files, state.key, found, result.changed, notes)


def _require_target(target: Path, source: Path, max_shard_size: int | None) -> bool:
    """Return whether ``target`` is to be a folder, as ``source`` is; raise if it cannot be."""
    is_file = target.suffix in _SUFFIXES
    if not is_file and not source.is_dir():
        raise _report_unknown_target(target)
    with disk_errors_as(CheckpointError, target):
        if is_file:
            require_place(target)
        else:
            require_folder_place(target)
        if max_shard_size is not None:
            require_place(target.with_name(name_shard(target.name, 1, 1)))
    if max_shard_size is not None and target.suffix != ".safetensors":
        raise CheckpointError(f"only safetensors can be sharded, and '{target}' is not")
    return not is_file


def _report_unknown_target(target: Path) -> CheckpointError:
    return CheckpointError(
        f"cannot write '{target}': it must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
    )


def _respell_all(
    state: StateDict,
    found: Sequence[Reparametrization],
    to: Spelling,
    only: Respellable | None,
    dims: Mapping[str, int] | None,
) -> Respelled:
    """Return ``state`` with all of ``found`` spelled as ``to``.

    Raises:
        CheckpointError: if one has no such spelling, or there is handwritten spectral norm, which
            would stay in the file.
    """
    try:
        result = respell(state, to, dims, found)
    except CheckpointError as error:
        is_partial = only is None and len({site.group for site in found}) > 1
        raise CheckpointError(f"{error}{_advise_only(found) if is_partial else ''}") from error
    handwritten = find_handwritten_norms(state.tensors)
    if handwritten and only is None:
        raise CheckpointError(
            f"cannot spell {quote_names(handwritten)} as {to}: it looks like handwritten spectral "
            "norm, and only the model's code can tell the weight in use ('sn-export onnx' runs "
            f"that){_advise_only(found)}"
        )
    return result


def _choose_sites(
    state: StateDict, only: Respellable | None
) -> tuple[tuple[Reparametrization, ...], tuple[Reparametrization, ...]]:
    """Return the sites that are to be respelled, and the others.

    A chain with links of several kinds, of which ``only`` is one, is returned among the first and
    blocked, since a part of a chain cannot be respelled.
    """
    chosen, left = list[Reparametrization](), list[Reparametrization]()
    for site in find_reparametrizations(state.tensors, state.versions):
        groups = {link.group for link in site.links or (site,)}
        if only is not None and only in groups and len(groups) > 1:
            site = replace(site, blocked=f"--only cannot take its {site.label} apart")
        (chosen if only is None or only in groups else left).append(site)
    return tuple(chosen), tuple(left)


def _set_map(
    found: tuple[Reparametrization, ...], orthogonal_map: OrthogonalMap | None
) -> tuple[Reparametrization, ...]:
    """Return ``found`` with the map set on its orthogonal sites.

    Raises:
        CheckpointError: if a map is given and no site needs one.
    """
    if orthogonal_map is None:
        return found
    unknown = [site.name for site in found if site.blocked == UNKNOWN_MAP]
    if not unknown:
        raise CheckpointError(f"--orthogonal-map {orthogonal_map} is of no use: nothing needs it")
    return tuple(
        replace(site, blocked="", orthogonal_map=orthogonal_map) if site.name in unknown else site
        for site in found
    )


def _name_kind(only: Respellable | None) -> str:
    return only.replace("_", " ") if only else "spectral norm, weight norm or the like"


def _describe_absence(checkpoint: Checkpoint, only: Respellable | None) -> str:
    absent = [
        f"no {_name_kind(name)} to convert: {keys}"
        for name, keys in _LOOKED_FOR.items()
        if only in (None, name)
    ]
    return f"'{checkpoint.path}' holds {'; and '.join(absent)}"


def _advise_only(found: Sequence[Reparametrization]) -> str:
    """Return a half-sentence on the options that convert a part of what was found, or ``""``."""
    possible = sorted({site.group for site in found if not site.blocked} & _LOOKED_FOR.keys())
    options = " or ".join(f"--only {name}" for name in possible)
    return f"; to leave that as it is: {options}" if options else ""


def _describe_rest(
    found: Sequence[Reparametrization],
    left: Sequence[Reparametrization],
    tensors: Mapping[str, Any],
    dims: Mapping[str, int],
) -> tuple[str, ...]:
    """Return notes on vectors that are no unit vectors, on assumed dims, and on tensors left."""
    notes = describe_lengths(found, tensors) + describe_assumed_dims(found, tensors, dims)
    by_label: dict[str, list[str]] = {}
    for site in left:
        by_label.setdefault(site.label, []).append(site.name)
    return notes + tuple(
        f"left as it is, under {label}: {quote_names(names)}" for label, names in by_label.items()
    )


def _write(
    checkpoint: Checkpoint,
    state: StateDict,
    result: Respelled,
    weights_only: bool,
    target: Path,
    max_shard_size: int | None,
    written: Callable[[str], None],
) -> list[Path]:
    """Write the format that the suffix of ``target`` names, or a folder of the kind that was read.

    Returns:
        The files written, or the folder.
    """
    texts, is_folder = checkpoint.file_metadata, target.suffix not in _SUFFIXES
    if target.suffix == ".safetensors":
        _require_tensors_only(checkpoint, state, weights_only, target)
        return write_safetensors(
            target.parent, target.name, result.entries, texts, max_shard_size, written
        )
    if not is_folder:
        write_torch_file(_make_content(checkpoint, state, result, weights_only, written), target)
    elif checkpoint.format == "safetensors":
        target.mkdir()
        write_safetensors(target, "model.safetensors", result.entries, texts, None, written)
    else:
        require_serializable(checkpoint.content, quote_name(checkpoint.path))
        content, path = (None, ()) if weights_only else (checkpoint.content, state.path)
        write_distributed(target, content, path, result.entries, written)
    return [target]


def _make_content(
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
            tensors[name] = tensors[name].clone()  # the file may be written to while it is mapped
        written(name)
    if result.versions is not None:
        tensors._metadata = result.versions  # type: ignore[attr-defined]
    require_serializable(tensors, f"the state dict in {quote_name(checkpoint.path)}")
    if weights_only or not state.path:
        return tensors
    content = replace_at(checkpoint.content, state.path, tensors)
    require_serializable(content, quote_name(checkpoint.path))
    return read_all(content)


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
