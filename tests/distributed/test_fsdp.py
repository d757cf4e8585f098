"""torch's own names of FSDP2's shards, which stand in one file: they are there, or it is said.

It reaches inside for the names themselves.
"""

from __future__ import annotations

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sn_export import FreezeError
from sn_export.distributed.fsdp import units_of


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
