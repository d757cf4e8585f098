"""Every test starts from the same random numbers and runs on one thread.

torch is imported where tests run: the process that only hands them out to others starts without.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import random
from typing import Any

import pytest
from torch_versions import lacks_of

# Imports and exports make objects by the million, and hardly any of them in circles.
gc.set_threshold(50_000, 20, 100)


# What waits for processes of its own comes first, and what is shortest last, so that of several
# workers none is left alone with a long test at the end.
_FIRST = ("test_readme.py", "test_workflow_recipe.py", "distributed/test_ranks.py")
_LAST = ("freezing/",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of what the installed torch lacks, and put all in their order."""

    def rank(item: pytest.Item) -> int:
        name = item.nodeid.removeprefix("tests/")
        return name.startswith(_LAST) - name.startswith(_FIRST)

    items.sort(key=rank)
    for item in items:
        for lack in lacks_of(item.nodeid.removeprefix("tests/")):
            item.add_marker(lack.mark())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed all three generators."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Compute in one thread, as on every machine."""
    import torch
    import torch._dynamo  # once: a test that runs pytest within takes what it imports out again

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_to_collect() -> None:
    """Take what is there, most of it imported modules, out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _disk_is_not_waited_for() -> None:
    """Flush nothing: those alone who look for it see that, and they put in a flush of their own.

    What runs in a process of its own, to be killed there, flushes.
    """
    os.fsync = os.fstat  # type: ignore[assignment]


# What torch's dynamo exporter finds out anew at each export, which takes it most of its time: the
# operators that there are, which of them it keeps, and what each of its 540 translations takes.
_FOUND_ANEW = (
    ("torch._export.utils", "_materialize_cpp_cia_ops"),
    ("torch._export.utils", "_check_valid_to_preserve"),
    ("torch.onnx._internal.exporter._schemas", "op_signature_from_function"),
)


@pytest.fixture(autouse=True, scope="session")
def _operators_are_looked_up_once() -> None:
    """Spare the exports of the tests what is the same at each."""
    for module, name in _FOUND_ANEW:
        place = importlib.import_module(module)
        if hasattr(place, name):  # torch 2.6 has others
            setattr(place, name, functools.cache(getattr(place, name)))


@pytest.fixture(autouse=True, scope="session")
def _kernels_are_registered_at_once() -> None:
    """Spare them the checks at each of 11,000 kernels that torch.export registers for a while."""
    from torch._ops import DispatchKey, OperatorBase

    checked = OperatorBase.py_impl

    def py_impl(operator: OperatorBase, key: Any) -> Any:
        if type(key) is not DispatchKey or key in operator.py_kernels:
            return checked(operator, key)

        def register(kernel: Any) -> Any:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return register

    OperatorBase.py_impl = py_impl  # type: ignore[method-assign]
