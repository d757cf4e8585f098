"""Inputs of other sizes than the example's, for the proof of dynamic shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .dynamic import DynamicDim
from .errors import ExportError, SnExportError
from .reference import Reference
from .samples import InputSet, random_like

_logger = logging.getLogger("sn_export")
_SEED = 1

Roots = Mapping[str, Sequence[DynamicDim]]


def resized_references(
    model: nn.Module,
    example: InputSet,
    dims: Sequence[DynamicDim],
    run: Callable[[InputSet], Reference],
) -> list[Reference]:
    """Run the model at the smallest, an odd and a larger size of its dynamic dimensions.

    All dimensions change together; those that the model then rejects, each on its own. Where it
    rejects a size, others near it are tried.

    Args:
        model: gives the names of its forward's parameters.
        example: the example input.
        dims: the dynamic dimensions of ``example``.
        run: runs the model, and raises a `SnExportError` where it rejects an input.

    Raises:
        ExportError: if the model takes no other size in a dimension that the user names.
    """
    roots: dict[str, list[DynamicDim]] = {}
    for dim in dims:
        roots.setdefault(dim.root, []).append(dim)
    inputs = _Resizer(model, example, dims)
    found: list[Reference] = []
    varied: set[str] = set()
    errors: dict[str, SnExportError] = {}
    for chosen in ([list(roots)] if roots else []) + [[root] for root in roots if len(roots) > 1]:
        if varied.issuperset(chosen):
            continue
        for attempts in _attempts({root: roots[root] for root in chosen}):
            for sizes in attempts:
                try:
                    reference = run(inputs.of(sizes))
                except SnExportError as error:  # the model's own limit, not the exporter's
                    _logger.info("not proved at these sizes: %s", error)
                    errors.update(dict.fromkeys(sizes, error))
                    continue
                found.append(reference)
                varied |= {root for root, size in sizes.items() if size != _now(roots[root])}
                break
    for root, group in roots.items():
        if root not in varied and root in errors and any(dim.is_promised for dim in group):
            raise ExportError(
                f"dimension {group[0].position} of '{group[0].tensor}' is declared dynamic "
                f"({root}), and the model takes no size that was tried but {group[0].size}: "
                f"{errors[root]}. Give it a range, torch.export.Dim('{root}', min=..., max=...), "
                "or leave it fixed"
            ) from errors[root].__cause__
    return found


def require_dynamic(shapes: Mapping[str, Sequence[object]], dims: Sequence[DynamicDim]) -> None:
    """Raise an ExportError if the file has fixed a dimension that the user names.

    Args:
        shapes: shape of each input of the file that has one, by the tensor's name; sizes of
            dynamic dimensions are no integers.
        dims: the dynamic dimensions.
    """
    for dim in dims:
        shape = shapes.get(dim.tensor, ())
        fixed = shape[dim.position] if dim.position < len(shape) else None
        if dim.is_promised and isinstance(fixed, int) and dim.range != (fixed, fixed):
            raise ExportError(
                f"dimension {dim.position} of '{dim.tensor}' is declared dynamic ({dim.root}), "
                f"and the exporter has fixed it at {fixed}"
            )


def _attempts(roots: Roots) -> Iterator[Iterator[dict[str, int]]]:
    """Yield three kinds of sizes, each with what to try where the model rejects one."""
    options = {root: _sizes(group) for root, group in roots.items()}
    seen: set[tuple[int, ...]] = {tuple(_now(group) for group in roots.values())}

    def unseen(kind: int) -> Iterator[dict[str, int]]:
        lists = [options[root][kind] or [_now(roots[root])] for root in roots]
        for i in range(max(map(len, lists))):
            sizes = tuple(sizes[min(i, len(sizes) - 1)] for sizes in lists)
            if sizes not in seen:
                seen.add(sizes)
                yield dict(zip(roots, sizes, strict=True))

    for kind in range(3):
        yield unseen(kind)


def _sizes(group: Sequence[DynamicDim]) -> tuple[list[int], list[int], list[int]]:
    """Return sizes to try: the smallest and its like, odd ones, and larger ones."""
    now = _now(group)
    low = max([1, *(dim.range[0] for dim in group)])
    high = min(dim.range[1] for dim in group)
    odd = now + 1 + now % 2

    def within(*sizes: int) -> list[int]:
        return list(dict.fromkeys(s for s in sizes if low <= s <= high and s != now))

    return (
        within(low, low + 1, now // 4, now // 2, now - 1),
        within(odd, odd - 2, odd - 4, 2 * now + 1),
        within(2 * now, 2 * now + 2, now + now // 2, now + 1, min(high, 4 * now)),
    )


def _now(group: Sequence[DynamicDim]) -> int:
    return group[0].root_size()


class _Resizer:
    """Makes inputs like the example of other sizes, with random values."""

    def __init__(self, model: nn.Module, example: InputSet, dims: Sequence[DynamicDim]) -> None:
        self._example = example
        self._names = {id(tensor): name for name, tensor in example.named_tensors(model)}
        self._dims = dims
        self._generator = torch.Generator().manual_seed(_SEED)

    def of(self, sizes: Mapping[str, int]) -> InputSet:
        """Return an input set; what ``sizes`` does not name stays as it is."""
        wanted = {
            (d.tensor, d.position): d.size_for(sizes[d.root]) for d in self._dims if d.root in sizes
        }

        def resize(tensor: Tensor) -> Tensor:
            name = self._names[id(tensor)]
            shape = [wanted.get((name, i), size) for i, size in enumerate(tensor.shape)]
            return random_like(_stretched(tensor, shape), self._generator)

        label = "size " + ", ".join(f"{root}={size}" for root, size in sizes.items())
        return self._example.map(resize, label)


def _stretched(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    # Only range, dtype and device matter to random_like; every value is seen at least once.
    index = tensor.detach()
    for position, size in enumerate(shape):
        old = index.shape[position]
        if old != size and old > 0:
            index = index.index_select(position, torch.arange(size, device=index.device) % old)
    return index
