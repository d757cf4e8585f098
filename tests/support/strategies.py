"""Hypothesis strategies: random trees of modules with spectral norm anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from hypothesis import strategies as st
from networks import KINDS, Scale, seed_torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

WIDTH = 3
NAMES = ("a", "b", "weight", "bias", "module")


class Sum(nn.Module):
    """A container that is no Sequential: adds what its children, list or dict, compute."""

    def __init__(self, children: nn.ModuleList | nn.ModuleDict) -> None:
        super().__init__()
        self.parts = children
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts.values() if isinstance(self.parts, nn.ModuleDict) else self.parts
        return sum((part(x) for part in parts), start=x @ self.own)


def _hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A user's hook that changes nothing."""


@st.composite
def leaves(draw: st.DrawFn) -> nn.Module:
    """A layer, often under spectral norm, sometimes with hooks and other parametrizations."""
    seed_torch(draw(st.integers(0, 5)))
    make: Callable[[], nn.Module] = draw(
        st.sampled_from(
            [
                lambda: nn.Linear(WIDTH, WIDTH),
                lambda: nn.Linear(WIDTH, WIDTH, bias=False),
                lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
                lambda: nn.LayerNorm(WIDTH),
                lambda: nn.Dropout(0.5),
                nn.Identity,
            ]
        )
    )
    module = make()
    if draw(st.booleans()):
        module.register_forward_pre_hook(_hook)
    if isinstance(module, nn.Linear):
        kind = draw(st.sampled_from([None, *KINDS]))
        if kind is not None:
            KINDS[kind](module, dim=draw(st.integers(0, 1)))
        if isinstance(module.bias, Tensor) and draw(st.booleans()):
            parametrize.register_parametrization(module, "bias", Scale())
    if draw(st.booleans()):
        module.register_forward_pre_hook(_hook)
    return module


@st.composite
def _containers(draw: st.DrawFn, children: st.SearchStrategy[nn.Module]) -> nn.Module:
    parts = draw(st.lists(children, min_size=1, max_size=4))
    if draw(st.booleans()):
        parts.append(parts[0])  # the same module a second time
    shape = draw(st.sampled_from(["sequential", "list", "dict"]))
    if shape == "sequential":
        return nn.Sequential(*parts)
    named = dict(zip(draw(st.permutations(NAMES)), parts, strict=False))
    container = Sum(nn.ModuleList(parts) if shape == "list" else nn.ModuleDict(named))
    kind = draw(st.sampled_from([None, *KINDS]))
    if kind is not None:
        KINDS[kind](container, "own")
    return container


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A tree of modules in mixed modes, some of it trained, none of it special to the tests."""
    model = draw(st.recursive(leaves(), _containers, max_leaves=8))
    if draw(st.booleans()):
        with torch.no_grad():
            model(torch.ones(2, WIDTH))  # torch cannot differentiate a module shared in train mode
        outputs = cast(Tensor, model.eval()(torch.ones(2, WIDTH)))
        if outputs.requires_grad:
            outputs.sum().backward()
    model.train(draw(st.booleans()))
    for module in model.modules():
        if draw(st.integers(0, 9)) == 0:
            module.training = not module.training
    return model
