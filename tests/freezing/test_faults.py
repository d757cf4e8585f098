"""Faults at each step of entering and leaving: nothing is ever left half done."""

from __future__ import annotations

import pytest
from faults import (
    Fault,
    Injected,
    damage,
    fault_while_entering,
    fault_while_leaving,
    second_is_printed,
)
from fingerprint import fingerprint
from networks import KINDS, Scale, seed_torch
from torch import nn
from torch.nn.utils import parametrize


def small_model(kind: str) -> nn.Module:
    """One of everything that is treated in its own way, and no more."""
    seed_torch(0)
    layers = [KINDS[kind](nn.Linear(2, 2))]
    if kind == "hook":
        layers.append(KINDS[kind](nn.GRU(1, 2, bias=False), "weight_hh_l0"))
    if kind == "parametrization":
        parametrize.register_parametrization(layers[0], "bias", Scale())
    return nn.Sequential(*layers)


FAULTY_KINDS = ("hook", "subclass", "parametrization", "chain-last")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        *((kind, KeyboardInterrupt) for kind in FAULTY_KINDS),
        ("hook", Injected),
    ],
)
def test_fault_at_any_step_of_entering_changes_nothing(
    kind: str, error: type[BaseException]
) -> None:
    """Whichever line of entering raises, the model is unchanged and can be frozen again."""
    model = small_model(kind)
    before = fingerprint(model)
    fault_while_entering(model, Fault())  # what is read once for each class is read here
    dry = Fault()
    fault_while_entering(model, dry)
    failures: list[str] = []
    # Of the kinds that are only entered at greater length, every third line.
    stride = 1 if kind in ("hook", "parametrization") else 3
    for step in dry.steps()[::stride]:
        fault = Fault(error, step)
        fault_while_entering(model, fault)
        assert fault.struck
        if found := damage(fault, before, model):
            failures += found
            model = small_model(kind)
            before = fingerprint(model)
    assert len(dry.steps()) > 50
    assert failures == []


@second_is_printed
@pytest.mark.parametrize("again", [0, 1, 7], ids=["once", "twice", "twice-later"])
@pytest.mark.parametrize("kind", FAULTY_KINDS)
def test_interrupt_at_any_step_of_leaving_restores_first(kind: str, again: int) -> None:
    """Whichever line of leaving is interrupted, the model is restored before that is raised."""
    model = small_model(kind)
    before = fingerprint(model)
    dry = Fault()
    fault_while_leaving(model, dry)
    failures: list[str] = []
    strikes = 0
    for step in dry.steps():
        fault = Fault(KeyboardInterrupt, step, again)
        if not fault_while_leaving(model, fault):
            failures.append(f"{fault.struck}: the interrupt was lost")
        strikes += len(fault.struck)
        if found := damage(fault, before, model):
            failures += found
            model = small_model(kind)
            before = fingerprint(model)
    assert len(dry.steps()) > 30
    assert strikes > (1.8 if again else 0.9) * len(dry.steps())
    assert failures == []
