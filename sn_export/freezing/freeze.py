"""The with-block, as it is called."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

from torch import nn

from .block import Block, Planner
from .plan import Keep
from .selection import Only, Selection
from .site import require_module

M = TypeVar("M", bound=nn.Module)


def frozen_spectral_norm(model: M) -> AbstractContextManager[M]:
    """Freeze every spectral norm of a model in one process for the length of a with-block.

    `sn_export.frozen_spectral_norm` promises, takes and raises the same, on any number of ranks.
    """
    return Block(require_module(model), Planner(Selection("spectral_norm")))


def frozen_parametrizations(model: M, only: Only = None) -> AbstractContextManager[M]:
    """Freeze everything that computes a weight, of a model in one process, for a with-block.

    `sn_export.frozen_parametrizations` promises, takes and raises the same, on any number of ranks.
    """
    return Block(require_module(model), Planner(Selection(only)))


def freeze_into(model: M, only: Only, keep: Keep) -> AbstractContextManager[M]:
    """Freeze as `frozen_parametrizations` does, with the weights where ``keep`` puts them.

    Args:
        model: any module.
        only: as for `frozen_parametrizations`.
        keep: takes the weights, each made when it is asked for, and returns tensors of the same
            bits, shapes and dtypes.
    """
    return Block(require_module(model), Planner(Selection(only), keep))
