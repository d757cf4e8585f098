"""Modules around a layer that set its normalised weight in forward, as copied from SAGAN code.

::

    class SpectralNorm(nn.Module):
        def __init__(self, module, name="weight", power_iterations=1): ...  # holds weight_bar
        def forward(self, *args):
            self._update_u_v()  # setattr(self.module, self.name, w / sigma)
            return self.module.forward(*args)

Names vary: what counts is a child without ``<name>`` but with ``<name>_bar`` or the like and
``<name>_u``, and a forward that, when run, has set ``<name>`` by the time it runs the child. All
that ``<name>`` is computed from may also be in the wrapper, under any names.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...text import qualify
from ..edits import Edits
from ..introspection.candidates import (
    Candidate,
    find_matrices,
    find_missing_weights,
    fits_weight,
    is_named_as_vector,
    iter_small_state,
)
from ..introspection.sandbox import make_placeholders
from ..introspection.source_code import Code, Member, is_mentioned, is_torch_layer
from .handwritten import Answer, HandwrittenSite, How, Override, make_frozen_class

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")


class WrapperSite(HandwrittenSite):
    """A weight that a module around the layer sets in its forward."""

    __slots__ = ("overrides",)
    kind = "wrapper"

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        tensor: str,
        answer: Answer,
        wrapper: nn.Module,
        overrides: tuple[Override, ...],
    ) -> None:
        super().__init__(path, layer, tensor, answer, wrapper)
        self.overrides = overrides

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Give the layer its weight, and the wrapper a class that does not touch it."""
        wrapper = self.owner
        self.take_away(edits)
        edits.set_class(
            wrapper, make_frozen_class(edits.get_planned_class(wrapper), self.overrides)
        )
        self.register(edits, frozen)


@dataclass(frozen=True)
class _Layer:
    """A layer that lacks a weight, and the name of the wrapper's child that it is."""

    child: str
    module: nn.Module
    candidate: Candidate


def find_wrappers(path: str, module: nn.Module, code: Code) -> list[WrapperSite]:
    """Return the sites of the layers that ``module``, with a class of ``code``, wraps."""
    sites = []
    for layer in _find_layers(module, code):
        site = _confirm(path, module, code, layer)
        if site is not None:
            sites.append(site)
    return sites


def _find_layers(wrapper: nn.Module, code: Code) -> Iterator[_Layer]:
    own = {**wrapper._parameters, **wrapper._buffers}
    beside = [(n, t) for n, t in iter_small_state(wrapper) if n in own]
    kept = find_matrices(wrapper)
    for child, layer in wrapper._modules.items():
        if layer is None or isinstance(layer, torch.jit.ScriptModule):
            continue
        missing_here = list(find_missing_weights(layer))
        if kept and is_torch_layer(type(layer)) and layer._parameters.get("weight") is None:
            missing_here += [Candidate("weight", raw, value) for raw, value in kept.items()]
        for missing in missing_here:
            if not is_mentioned(missing.raw, code.names) or _has_hook(layer, missing.tensor):
                continue
            state = list(missing.state)
            state += [n for n, t in beside if fits_weight(n, t, missing.weight)]
            if any(map(is_named_as_vector, state)):
                state += [n for n, t in beside if t.numel() == 1]
                names = tuple(dict.fromkeys(state))
                yield _Layer(child, layer, replace(missing, state=names, is_certain=True))


def _has_hook(layer: nn.Module, tensor: str) -> bool:
    return any(getattr(h, "name", None) == tensor for h in layer._forward_pre_hooks.values())


@dataclass
class _Call:
    """How a wrapper called its layer."""

    way: How = "forward"
    is_all: bool = False  # the wrapper does no more than hand on its arguments and the result


def _confirm(path: str, wrapper: nn.Module, code: Code, layer: _Layer) -> WrapperSite | None:
    candidate, call = layer.candidate, _Call()
    value = candidate.confirm(lambda: _run(wrapper, layer, call), [wrapper, layer.module])
    overrides: tuple[Override, ...] = (Override("forward", call.way, layer.child),)
    if not call.is_all:
        # The forward does more than that, so it stays; the methods that set the weight do not.
        setters = code.find_updates((candidate.raw, *candidate.state))
        overrides = tuple(Override(m.name, "nothing") for m in setters)
        if value is None:
            value = _compute_value_after(wrapper, layer, setters)
        rest = code.mentions(code.forward, {m.name for m in setters})
        if not setters or any(is_mentioned(n, rest) for n in (candidate.raw, *candidate.state)):
            return None
    if value is None:
        return None
    answer = Answer(candidate.raw, value, candidate.state)
    inner = qualify(path, layer.child)
    return WrapperSite(inner, layer.module, candidate.tensor, answer, wrapper, overrides)


def _run(wrapper: nn.Module, layer: _Layer, call: _Call) -> Tensor | None:
    """Run the wrapper's forward up to that of the layer, and return the weight found there."""
    result = object()
    given = make_placeholders(wrapper)
    value: Tensor | None = None
    is_same = False

    def forward(*args: Any, **kwargs: Any) -> object:
        nonlocal value, is_same
        value = getattr(layer.module, layer.candidate.tensor).detach().clone()
        is_same = not kwargs and len(args) == len(given) and all(map(operator.is_, args, given))
        return result

    def note_call(_module: nn.Module, _args: Any) -> None:
        call.way = "call"

    attributes = layer.module.__dict__
    attributes["forward"] = forward
    attributes["_compiled_call_impl"] = None
    for hooks in _HOOKS:  # not the user's: there is no input yet
        attributes[hooks] = OrderedDict()
    attributes["_forward_pre_hooks"][0] = note_call
    try:
        call.is_all = wrapper.forward(*given) is result and is_same
    except Exception:
        call.is_all = False  # it did something with its input or with the result
    return value


def _compute_value_after(
    wrapper: nn.Module, layer: _Layer, setters: Sequence[Member]
) -> Tensor | None:
    def run() -> Tensor:
        for member in setters:
            getattr(wrapper, member.name)()
        value: Tensor = getattr(layer.module, layer.candidate.tensor)
        return value.detach().clone()

    return layer.candidate.confirm(run, [wrapper, layer.module])
