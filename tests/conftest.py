"""Every test starts from the same random numbers and runs on one thread."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed all three generators."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
