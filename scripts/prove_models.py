"""Random trees of modules, and random lives of a model beside a twin that is never frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from fingerprint import fingerprint, same_bits
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from prove_common import Row
from strategies import WIDTH, networks
from torch import Tensor, nn

from sn_export import find_spectral_norm, frozen_parametrizations, frozen_spectral_norm


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for trees, and one for lives."""
    profile = settings(
        max_examples=30 if quick else 1000,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    tries = _Tries()

    @profile
    @given(model=networks(), everything=st.booleans())
    def tree(model: nn.Module, everything: bool) -> None:
        tries.tree(model, everything)

    tree()
    yield tries.row("freeze and restore a random tree of modules")
    Life.tries = tries = _Tries()
    run_state_machine_as_test(Life, settings=settings(profile, stateful_step_count=20))
    yield tries.row("a random life, bit for bit that of a twin that is never frozen")


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _copy(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():  # torch's hook leaves a weight with a graph, which cannot be copied
        model(torch.ones(2, WIDTH))
    model.zero_grad()  # which a copy lacks
    return copy.deepcopy(model)


class _Tries:
    """Counts examples, and goes on after those that fail."""

    def __init__(self) -> None:
        self.count = 0
        self.steps = 0
        self.failures: list[str] = []

    def row(self, attack: str) -> Row:
        note = f"{self.steps} steps" if self.steps else ""
        failed = min(self.count, len(self.failures))
        return Row(attack, self.count, self.count - failed, note, self.failures)

    def tree(self, model: nn.Module, everything: bool) -> None:
        """Freeze a tree, change nothing, and look for differences."""
        self.count += 1
        x = torch.ones(2, WIDTH)
        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            expected = model.eval()(x)
        _set_modes(modes)
        before = fingerprint(model)
        block = frozen_parametrizations if everything else frozen_spectral_norm
        with torch.no_grad(), block(model):
            found = model.eval()(x)
            left = find_spectral_norm(model)
            _set_modes(modes)
        differences = before.differences(fingerprint(model))
        if not same_bits(expected, found) or left or differences:
            self.failures.append(f"{model}: {differences[:2]}")


class Life(RuleBasedStateMachine):
    """A model in the hands of somebody who freezes it all the time, and its twin."""

    tries = _Tries()

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[object] = []

    @initialize(model=networks())
    def begin(self, model: nn.Module) -> None:
        """Make the twin."""
        self.tries.count += 1
        self.model, self.twin = model, _copy(model)
        self.saved = copy.deepcopy(model.state_dict())

    def both(self, act: Callable[[nn.Module], object]) -> None:
        """Do the same to either, with the same random numbers."""
        self.tries.steps += 1
        outcomes = []
        for model in (self.model, self.twin):
            torch.manual_seed(self.tries.steps)
            try:
                outcomes.append(act(model))
            except RuntimeError as error:  # torch's own: a module shared in train mode, say
                outcomes.append(type(error))
        one, other = outcomes
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = same_bits(one, other)
        else:
            same = one == other
        if not same:
            self.tries.failures.append(f"{act.__name__}: {outcomes}")

    @rule(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        """Go to train or eval mode."""
        self.both(lambda model: model.train(training) and None)

    @rule()
    def forward(self) -> None:
        """Compute; in train mode the vectors move."""
        self.both(lambda model: model(torch.randn(2, WIDTH)).detach())

    @rule()
    def step(self) -> None:
        """Train by one step."""

        def train(model: nn.Module) -> None:
            parameters = [p for p in model.parameters() if p.requires_grad]
            if not parameters:
                return
            optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
            optimizer.zero_grad()
            output = model(torch.randn(2, WIDTH))
            if output.requires_grad:
                output.square().mean().backward()
            optimizer.step()

        self.both(train)

    @rule()
    def save(self) -> None:
        """Keep the state."""
        self.saved = copy.deepcopy(self.twin.state_dict())

    @rule()
    def load(self) -> None:
        """Go back to the state that was kept."""
        self.both(lambda model: str(model.load_state_dict(copy.deepcopy(self.saved))))

    @rule()
    def replace_by_copy(self) -> None:
        """Go on with deep copies, which share the classes that torch has made."""
        self.model, self.twin = _copy(self.model), _copy(self.twin)

    @rule(everything=st.booleans(), fails=st.booleans(), computes=st.booleans())
    def freeze(self, everything: bool, fails: bool, computes: bool) -> None:
        """Enter a block and leave it, by an error or not; only the model is frozen."""
        modes = [(module, module.training) for module in self.model.modules()]
        block = frozen_parametrizations if everything else frozen_spectral_norm
        try:
            with block(self.model), torch.no_grad():
                if computes:
                    self.model.eval()(torch.ones(2, WIDTH))
                with frozen_spectral_norm(self.model):  # nested
                    copy.deepcopy(self.model.state_dict())
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        finally:
            _set_modes(modes)

    @rule()
    def overlap(self) -> None:
        """Enter two blocks and leave the first one first."""
        first, second = frozen_spectral_norm(self.model), frozen_parametrizations(self.model)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def is_as_its_twin(self) -> None:
        """Every tensor of the state has the same bits, under the same key, in the same order."""
        one, other = self.model.state_dict(), self.twin.state_dict()
        same = list(one) == list(other) and all(same_bits(one[k], other[k]) for k in one)
        grads = [
            (p.grad is None) == (q.grad is None)
            and (p.grad is None or q.grad is None or same_bits(p.grad, q.grad))
            for p, q in zip(self.model.parameters(), self.twin.parameters(), strict=True)
        ]
        if not same or not all(grads):
            self.tries.failures.append("the state differs from the twin's")
            self.twin = _copy(self.model)
