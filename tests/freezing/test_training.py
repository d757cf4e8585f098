"""Training goes through a block as if it were not there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fingerprint import contents
from networks import KINDS, images, net, seed_torch
from torch import Tensor, nn

from sn_export import frozen_spectral_norm


def train(kind: str, steps: int, blocks: dict[int, str]) -> dict[str, Any]:
    """Train with Adam and dropout, with blocks before some of the steps; return everything."""
    model = net(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seed_torch(11)
    losses = []
    for step in range(steps):
        if step in blocks:
            visit(model, blocks[step])
        optimizer.zero_grad()
        loss = model(images(step)).square().mean()
        if blocks.get(step) == "between":
            visit(model, "look")
        loss.backward()
        optimizer.step()
        losses.append(contents(loss))
    return {
        "losses": losses,
        "state": [(name, contents(t)) for name, t in model.state_dict().items()],
        "adam": {
            key: {name: contents(t) for name, t in entry.items()}
            for key, entry in optimizer.state_dict()["state"].items()
        },
        "rng": contents(torch.get_rng_state()),
        "next": contents(model(images())),
    }


def visit(model: nn.Module, what: str) -> None:
    """Freeze the model and use it, without random numbers, batch statistics or gradients."""
    with frozen_spectral_norm(model) as plain:
        if what == "eval":
            plain.eval()
            with torch.no_grad():
                plain(images())
            plain.train()
        elif what == "fork":
            statistics = [t.clone() for t in plain.buffers()]
            with torch.random.fork_rng(), torch.no_grad():
                plain(images())
                for t, value in zip(plain.buffers(), statistics, strict=True):
                    t.copy_(value)
        else:
            plain.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["look", "eval", "fork", "between"])
def test_training_continues_bit_for_bit(kind: str, what: str) -> None:
    """Parameters, optimizer state, random numbers and losses equal those without a block."""
    assert train(kind, 6, {0: what, 3: what, 5: what}) == train(kind, 6, {})


@pytest.mark.parametrize("kind", KINDS)
def test_second_backward_through_a_block(kind: str) -> None:
    """A graph that was recorded before a block can be differentiated after it."""

    def gradients(inside: bool) -> list[bytes]:
        model = net(kind).eval()
        loss = model(images()).sum()
        with frozen_spectral_norm(model) if inside else nullcontext():
            pass
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        return [contents(g) for g in grads]

    assert gradients(True) == gradients(False)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_moment(kind: str) -> None:
    """Blocks at different steps of training freeze different weights, each those of its step."""
    model = net(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor] = []
    for step in range(3):
        with frozen_spectral_norm(model):
            seen.append(model.head.weight)
        model.eval()
        with torch.no_grad():
            model(images())
            assert torch.equal(seen[-1], model.head.weight)
        model.train()
        model(images(step)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
