"""Every test starts from the same random numbers and runs on one thread."""

from __future__ import annotations

import functools
import gc
import importlib
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


# What torch's dynamo exporter finds out anew at each export, which takes it most of its time: the
# operators that there are, and the types that each of its 540 translations takes.
_FOUND_ANEW = {
    "torch._export.utils": "_materialize_cpp_cia_ops",
    "torch.onnx._internal.exporter._schemas": "op_signature_from_function",
}


@pytest.fixture(autouse=True, scope="session")
def _operators_are_looked_up_once() -> None:
    """Spare the exports of the tests what is the same at each."""
    for module, name in _FOUND_ANEW.items():
        place = importlib.import_module(module)
        if hasattr(place, name):  # torch 2.6 has others
            setattr(place, name, functools.cache(getattr(place, name)))
