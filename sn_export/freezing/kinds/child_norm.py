"""Layers that hand their weight to a child in forward, which keeps the vectors and divides it.

::

    class SNConv2d(nn.Conv2d):  # weight; sn.u, sn.v
        def forward(self, x):
            return self._conv_forward(x, self.sn(self.weight), self.bias)

The child may be torch's own link, called by hand. Its calls are recorded while the forward runs,
which must hand the weight to the child, and do nothing else with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...running import SpectralNormLink
from ..edits import Edits
from ..introspection.candidates import (
    Candidate,
    find_matrices,
    fits_weight,
    is_named_as_vector,
    iter_small_state,
    mentions_norm,
)
from ..introspection.sandbox import AbsorbingArgument, Probe, make_placeholders
from ..introspection.source_code import Code, count_reads, read_code
from .handwritten import Answer, HandwrittenSite, make_frozen_class


class ChildNormSite(HandwrittenSite):
    """A weight that a child of the module normalises in the module's forward."""

    __slots__ = ("child",)
    kind = "mixin"

    def __init__(
        self, path: str, module: nn.Module, answer: Answer, child: str, helper: nn.Module
    ) -> None:
        super().__init__(path, module, answer.raw, answer, helper)
        self.child = child

    @property
    def hidden(self) -> tuple[nn.Module, ...]:
        """The child."""
        return (self.owner,)

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Exchange the weight, and the child for one that gives it back."""
        module = self.module
        # The child itself stays as it is: other modules may share it.
        edits.edit(module._modules)[self.child] = nn.Identity().train(module.training)
        edits.edit(module._parameters)[self.tensor] = frozen
        edits.set_class(module, make_frozen_class(edits.get_planned_class(module), ()))

    def follow_mode(self, training: bool) -> None:
        """Give the child the mode that ``module.train()`` would have given it."""
        for module in self.owner.modules():
            module.__dict__["training"] = training


def find_child_norms(path: str, module: nn.Module, code: Code) -> list[ChildNormSite]:
    """Return the sites of the weights that children of ``module`` normalise."""
    sites = []
    for raw, weight in find_matrices(module).items():
        for child, helper, state in _find_helpers(module, weight):
            candidate = Candidate(raw, raw, weight, state)
            value = _confirm(module, code, candidate, child, helper)
            if value is not None:
                sites.append(ChildNormSite(path, module, Answer(raw, value, state), child, helper))
                break
    return sites


def _find_helpers(
    module: nn.Module, weight: Tensor
) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    for child, helper in module._modules.items():
        if helper is None or isinstance(helper, torch.jit.ScriptModule):
            continue
        names = read_code(type(helper)).names
        if not isinstance(helper, SpectralNormLink) and not mentions_norm(names):
            continue
        state = tuple(name for name, t in iter_small_state(helper) if fits_weight(name, t, weight))
        is_trained = any(p.requires_grad for p in helper.parameters())
        has_hooks = helper._forward_hooks or helper._forward_pre_hooks
        if any(map(is_named_as_vector, state)) and not is_trained and not has_hooks:
            yield child, helper, state


def _confirm(
    module: nn.Module, code: Code, candidate: Candidate, child: str, helper: nn.Module
) -> Tensor | None:
    """Return what the child makes of the weight, if forward does nothing else with that."""
    methods = ["forward", *(member.name for member in code.iter_used(code.forward))]
    reads, uses = (
        sum(count_reads(type(module), method, name) for method in methods)
        for name in (candidate.raw, child)
    )
    if not uses or reads != uses:
        return None
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = helper.forward

    def record_call(*args: Any, **kwargs: Any) -> Any:
        value = original(*args, **kwargs)
        calls.append(((*args, *kwargs.items()), value))
        return value

    def run() -> Tensor | None:
        helper.__dict__["forward"] = record_call
        helper.__dict__["_compiled_call_impl"] = None
        probe = Probe.of(module)
        inputs = (
            make_placeholders(module, AbsorbingArgument)
            if probe is None
            else [probe.make_example()]
        )
        with contextlib.suppress(Exception):
            module.forward(*inputs)
        weight = module._parameters[candidate.raw]
        if len(calls) < uses or any(len(a) != 1 or a[0] is not weight for a, _ in calls):
            return None
        first, *others = (value for _, value in calls)
        is_one = isinstance(first, Tensor) and all(torch.equal(first, other) for other in others)
        return first.clone() if is_one else None

    return candidate.confirm(run, [module, *helper.modules()])
