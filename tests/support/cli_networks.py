"""Networks for the tests of checkpoints and of the command line, and their checkpoints."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from networks import APPLY
from torch import Tensor, nn

Kind = Literal["plain", "hook", "parametrization"]


class Critic(nn.Module):
    """Convolutions, one of them square, a transposed one and a linear layer."""

    def __init__(self, kind: Kind = "hook", ch: int = 4) -> None:
        super().__init__()
        apply = APPLY[kind]
        self.body = nn.Sequential(
            apply(nn.Conv2d(3, ch, 3, padding=1)),
            nn.BatchNorm2d(ch),
            nn.LeakyReLU(0.2),
            apply(nn.Conv2d(ch, ch, 3, padding=1)),
            apply(nn.ConvTranspose2d(ch, 2, 2)),
        )
        self.head = apply(nn.Linear(2, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


class NoisyCritic(Critic):
    """The critic, with noise on its scores."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.randn_like(out)


class Lstm(nn.Module):
    """Two tensors under spectral norm in one module, both square or nearly."""

    def __init__(self, kind: Kind = "hook") -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            APPLY[kind](self.rnn, name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


class Tokens(nn.Module):
    """A critic of token sequences with an optional keyword argument."""

    def __init__(self, kind: Kind = "hook") -> None:
        super().__init__()
        self.embed = APPLY[kind](nn.Embedding(7, 4))
        self.head = APPLY[kind](nn.Linear(4, 2))

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.embed(ids)).sum(1)
        return out if scale is None else out * scale


class Scored(nn.Module):
    """A wrapper around the critic that a checkpoint is for."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = Critic()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.critic(x))

    def features(self, x: Tensor) -> Tensor:
        """What the critic's head is given."""
        out: Tensor = self.critic.body(x)
        return out


class Pipeline:
    """What is no module, around the critic that a checkpoint is for."""

    def __init__(self) -> None:
        self.rate = 16000
        self.critic = Critic()


class Unknown(nn.Module):
    """Spectral norm in a way of its own, which nothing knows: a helper is given the weight."""

    u: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("u", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        v = nn.functional.normalize(self.weight.t() @ self.u, dim=0)
        sigma = torch.linalg.vector_norm(self.weight @ v)
        return x @ (self.weight / sigma).t()


class Untraceable(Unknown):
    """Asks for a value, which torch.export does not have and tracing does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if float(x.sum()) < 1e9 else 2.0)


class Exits(Unknown):
    """Leaves the program, as a script does that is done."""

    def forward(self, x: Tensor) -> Tensor:
        raise SystemExit(0)


def exits() -> Exits:
    """Return a network that ends the program when it runs."""
    return Exits()


def chatty() -> Unknown:
    """Return a network, and print."""
    print("building a network")
    return Unknown()


def untraceable() -> Untraceable:
    """Return a network that the dynamo exporter cannot take."""
    return Untraceable()


def critic(kind: Kind = "hook", ch: int = 4) -> Critic:
    """Return a new critic."""
    return Critic(kind, ch)


def plain_critic() -> Critic:
    """Return a critic without spectral norm."""
    return Critic("plain")


def parametrized_critic() -> Critic:
    """Return a critic with parametrizations."""
    return Critic("parametrization")


def tokens() -> Tokens:
    """Return a critic of tokens."""
    return Tokens()


def wide_critic() -> Critic:
    """Return a critic that no checkpoint of `critic` fits."""
    return Critic("hook", 6)


def broken() -> Critic:
    """Raise, as a factory that wants arguments does."""
    raise ValueError("no configuration given")


def a_number() -> int:
    """Return what is no module."""
    return 3


def trained(model: nn.Module, *inputs: Tensor, steps: int = 3) -> nn.Module:
    """Return ``model`` after a few passes in train mode and steps of an optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    model(*inputs)
    return model


def trained_critic(kind: Kind = "hook", seed: int = 0) -> Critic:
    """Return a critic in eval mode that has been trained a little, and leave the seed behind it."""
    model, state = _train_critic(kind, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _train_critic(kind: Kind, seed: int) -> tuple[Critic, Tensor]:
    torch.manual_seed(seed)
    model, x = Critic(kind), torch.randn(4, 3, 8, 8)
    trained(model, x).eval()
    with torch.no_grad():
        model(x)  # a weight that a hook has computed under gradients cannot be copied
    return model, torch.get_rng_state()


def prefixed(state: dict[str, Any], prefix: str) -> OrderedDict[str, Any]:
    """Return a state dict as a wrapper saves it, with the versions of the modules."""
    result = OrderedDict((prefix + name, value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        result._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{prefix}{path}".rstrip("."), entry) for path, entry in versions.items()
        )
    return result


def before_v(state: dict[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """Return a hook's state dict as torch wrote it before it kept v (version None)."""
    old: OrderedDict[str, Any] = OrderedDict()
    for name, value in state.items():
        if name.endswith("weight_v"):
            continue
        old[name] = value
        if name.endswith("weight_orig"):
            base = name.removesuffix("_orig")
            module = model.get_submodule(base.rpartition(".")[0])
            hook = next(iter(module._forward_pre_hooks.values()))
            old[base] = hook.compute_weight(module, False).detach()  # type: ignore[attr-defined]
    return old


ALONE = {} if torch.__version__ < "2.9" else {"no_dist": True}  # of dcp.save and dcp.load


def save_folder(content: dict[str, Any], path: Path) -> None:
    """Save a folder of torch.distributed.checkpoint without ranks; an old torch warns of that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=path, **ALONE)
