"""torch's own names of FSDP2's shards, which stand in one file: they are there, or it is said.

It reaches inside for the names themselves.
"""

from __future__ import annotations

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext, FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, FSDPStateContext

from sn_export import FreezeError
from sn_export.distributed.fsdp import (
    _CONTEXT,
    _DTYPE,
    _GATHERED,
    _GROUP,
    _ORDER,
    _PARAM,
    _STATE,
    units_of,
)


@pytest.mark.parametrize(
    "cls, names",
    [
        (FSDPParam, (*_PARAM, _DTYPE, _GATHERED)),
        (FSDPParamGroup, _GROUP),
        (FSDPCommContext, (_ORDER,)),
        (FSDPState, _STATE),
        (FSDPStateContext, _CONTEXT),
    ],
)
def test_torch_has_not_moved_its_names(cls: type, names: tuple[str, ...]) -> None:
    """Each private name that is used is one of torch's class; the list of them is inside a room."""
    known = {*dir(cls), *cls.__annotations__}
    known |= {n for f in vars(cls).values() if hasattr(f, "__code__") for n in f.__code__.co_names}
    assert known >= set(names)


def test_a_state_that_is_not_known_is_refused() -> None:
    """A torch that keeps its shards elsewhere gives a FreezeError that says so, and its version.

    No process group is needed to ask, so this reaches inside the wing.
    """

    class Sharded(FSDPModule, nn.Linear):
        def _get_fsdp_state(self) -> object:
            return object()

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__class__ = Sharded
    with pytest.raises(FreezeError, match=r"has moved FSDPState\._fsdp_param_groups, by which"):
        units_of(model)
