"""A plugin of pytest for prove_mutation.py: which lines each test runs, and how long it takes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from coverage import Coverage

_SECONDS: dict[str, float] = {}
_TRACE = sys.gettrace()  # of the measurement, which has begun


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give what is run to the test, by its whole name.

    The trace function is set anew each time: a test that raises out of one of its own ends it.
    """
    measured = Coverage.current()
    assert measured is not None
    sys.settrace(_TRACE)
    measured.switch_context(item.nodeid)
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        _SECONDS[item.nodeid] = time.perf_counter() - start


def pytest_sessionfinish() -> None:
    """Write the seconds of each test to the file that the environment names."""
    Path(os.environ["PROVE_SECONDS"]).write_text(json.dumps(_SECONDS))
