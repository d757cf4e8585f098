"""Every test starts from the same random numbers and runs on one thread."""

from __future__ import annotations

import functools
import gc
import random

import numpy as np
import pytest
import torch
import torch._dynamo  # once: a test that runs pytest within takes what it imports out again
from torch_versions import lacks_of

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of what the installed torch lacks."""
    for item in items:
        for lack in lacks_of(item.nodeid.removeprefix("tests/")):
            item.add_marker(lack.mark())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed all three generators."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_to_collect() -> None:
    """Take what is there, most of it imported modules, out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _operators_are_looked_up_once() -> None:
    """Spare the dynamo exporter a third of its time: torch looks for new operators 54 times."""
    from torch._export import utils

    name = "_materialize_cpp_cia_ops"
    if hasattr(utils, name):
        setattr(utils, name, functools.cache(getattr(utils, name)))
