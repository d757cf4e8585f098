"""Faults at each step of a block on every reparametrization: nothing is ever left half done."""

from __future__ import annotations

import pytest
from faults import Fault, second_is_printed
from fingerprint import Fingerprint, fingerprint
from networks import Scale, seed_torch
from reparam_networks import hooked, pruned, registered
from torch import nn
from torch.nn.utils import parametrizations, prune

from sn_export import FreezeError, frozen_parametrizations


def small_model(part: str) -> nn.Module:
    """One or two layers under what ``part`` says."""
    seed_torch(0)
    if part == "hooks":
        recurrent = hooked(nn.GRU(1, 2, bias=False), "weight_hh_l0")
        return nn.Sequential(pruned(nn.Linear(2, 2)), recurrent)
    model = parametrizations.orthogonal(nn.Linear(2, 2))
    registered(Scale)(model, "bias")
    return nn.Sequential(model, parametrizations.weight_norm(nn.Linear(2, 2)))


def spoil(model: nn.Module) -> None:
    """Reparametrise a frozen weight."""
    first = model[0]  # type: ignore[index]
    if type(model[1]) is nn.Linear:  # type: ignore[index]
        prune.identity(first, "weight")
    else:
        parametrizations.spectral_norm(first)


def run(model: nn.Module, fault: Fault, moment: str) -> bool:
    """Run a block under a fault at a moment; return whether the fault came out."""
    try:
        with fault:
            if moment == "entering":
                fault.start()
            with frozen_parametrizations(model):
                fault.stop()
                if moment == "after edits":
                    spoil(model)
                if moment != "entering":
                    fault.start()
    except FreezeError:
        return True
    return fault.came_out


def left_over(before: Fingerprint, model: nn.Module, moment: str) -> list[str]:
    """The differences, but for what registering inside draws and counts."""
    found = before.differences(fingerprint(model))
    own = ("next hook id", "rng torch") if moment == "after edits" else ()
    return [d[:160] for d in found if not d.startswith(own)]


@second_is_printed
@pytest.mark.filterwarnings("ignore:the frozen '0.weight' was changed")
@pytest.mark.parametrize("part", ["hooks", "chains"])
@pytest.mark.parametrize(
    ("moment", "again"),
    [("entering", 0), ("leaving", 0), ("leaving", 5), ("after edits", 0), ("after edits", 5)],
)
def test_fault_at_any_step(part: str, moment: str, again: int) -> None:
    """Whichever line is interrupted, the model is as it was, and can be frozen again."""
    model = small_model(part)
    before = fingerprint(model)
    run(model, Fault(), moment)
    dry = Fault()
    run(model, dry, moment)
    steps = dry.steps()
    failures: list[str] = []
    strikes = 0
    # Entering is long: every third line of it here, every line for spectral norm elsewhere.
    for step in steps[:: 3 if moment == "entering" else 1]:
        fault = Fault(KeyboardInterrupt, step, again)
        came_out = run(model, fault, moment)
        assert fault.struck
        strikes += len(fault.struck) - 1
        if moment != "entering" and not came_out:
            failures.append(f"{fault.struck}: the interrupt was lost")
        if found := left_over(before, model, moment):
            failures.append(f"{fault.struck}: {found[:2]}")
            model = small_model(part)
            before = fingerprint(model)
    assert len(steps) > 50
    assert strikes > 0.8 * len(steps) or not again
    assert failures == []
    with frozen_parametrizations(model):
        assert not any("parametrizations" in name for name in model.state_dict())
