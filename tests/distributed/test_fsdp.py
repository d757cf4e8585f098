"""The private names by which FSDP2's shards are reached, all in one file.

It reaches inside for the names themselves.
"""

from __future__ import annotations

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sn_export import FreezeError
from sn_export.distributed.fsdp import find_units


def test_a_state_that_is_not_known_is_refused() -> None:
    """If torch has moved a name, the FreezeError gives the name and the version of torch.

    No process group is needed to ask, so this reaches inside the wing.
    """

    class Sharded(FSDPModule, nn.Linear):
        def _get_fsdp_state(self) -> object:
            return object()

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__class__ = Sharded
    with pytest.raises(FreezeError, match=r"has moved FSDPState\._fsdp_param_groups, by which"):
        find_units(model)
