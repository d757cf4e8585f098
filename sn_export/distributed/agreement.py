"""Errors of one rank, raised on all: otherwise the others wait for it in their next collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from ..errors import FreezeError

Told = tuple[str, str, str]  # the tensor, the reason and the remedy of a FreezeError


def raise_on_all_ranks(error: Exception | None, meshes: Iterable[Any], path: str) -> None:
    """Raise what failed on any rank of ``meshes``; a collective call of all of them.

    Args:
        error: what failed on this rank.
        meshes: device meshes that this rank is part of, in the same order on each rank.
        path: what is named where the error is no FreezeError.

    Raises:
        FreezeError: with the lowest rank on which something failed, the same on every rank.
    """
    failed: dict[int, Told] = {}
    if error is not None:
        failed[dist.get_rank()] = _told(error, path)
    for mesh in meshes:
        for group in mesh.get_all_groups():
            everyone: list[dict[int, Told]] = [{} for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(everyone, failed, group=group)
            failed = {rank: told for one in everyone for rank, told in one.items()}
    if failed:
        rank = min(failed)
        raise FreezeError(*failed[rank], rank=rank) from error


def _told(error: Exception, path: str) -> Told:
    if isinstance(error, FreezeError):
        return error.tensor, error.reason, error.remedy
    reason = f"it raised {type(error).__name__}: {error}"
    return path, reason, "The other ranks have left the block with this error too"
