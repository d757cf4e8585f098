"""Interrupts while a forward is taken back: the model is as it was before they come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from export_models import assert_as_before
from faults import Fault
from fingerprint import fingerprint
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sn_export.running import preserved, run_without_trace, tensor_memory


class Writing(nn.Module):
    """Writes whatever a forward can write."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        base = torch.ones(3)
        self.register_buffer("base", base)
        self.register_buffer("view", base[:2])
        self.kept: list[Tensor] = []
        self.array = np.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.add_(1)
        self.base.add_(1)
        self.kept.append(x)
        self.array += 1
        np.random.rand()
        return x * self.view * torch.rand(2)


def _leave(model: Writing, fault: Fault) -> None:
    with fault, preserved(model):
        model(torch.ones(2))
        fault.start()


def _enter(model: Writing, fault: Fault) -> None:
    with fault:
        fault.start()
        with preserved(model):
            fault.stop()
            model(torch.ones(2))


def _ask(model: Writing, fault: Fault) -> None:
    @contextmanager
    def other_mode() -> Iterator[None]:
        before = model.training
        model.training = not before
        try:
            yield
        finally:
            model.training = before

    def run() -> None:
        with other_mode():  # an interrupt within contextlib leaves it suspended
            model.base.add_(1)
        model.kept.append(model.view)

    with fault:
        fault.start()
        run_without_trace(run, [model])


@pytest.mark.parametrize("limit", [2**29, 0])
@pytest.mark.parametrize("run", [_enter, _leave, _ask])
def test_an_interrupt_at_any_step(
    run: Callable[[Writing, Fault], None], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever line is interrupted, that comes out, and model and random states are as before.

    So they are of a large model, whose parameters are watched and copied when they are written.
    """
    monkeypatch.setattr(tensor_memory, "LARGE", limit)
    model = Writing()
    before = fingerprint(model)
    run(model, Fault())
    dry = Fault()
    run(model, dry)
    assert len(dry.steps()) > 40
    lost = 0
    for step in dry.steps():
        fault = Fault(KeyboardInterrupt, step)
        run(model, fault)
        lost += not fault.came_out
        assert_as_before(before, model)
        assert not _get_current_dispatch_mode_stack()
    assert lost == 0
