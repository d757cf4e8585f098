"""A forward without its noise: every random number that it draws is zero.

Torch's functions are overridden, not its operators: exporters run the forward under modes of their
own, which have recorded an operator before a mode around them could replace it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..text import require_choice

DRAWS = (None, "zeros")


def require_draws(draws: Any) -> str | None:
    """Return how random numbers are drawn, or raise a ValueError."""
    chosen: str | None = require_choice("draws", draws, DRAWS)
    return chosen


def drawing(draws: str | None) -> AbstractContextManager[Any]:
    """Return a context in which random numbers are drawn in that way."""
    return nullcontext() if draws is None else ZeroDraws()


def describe_draws(draws: str | None) -> str:
    """Return a sentence on a proof without noise, or nothing."""
    if draws is None:
        return ""
    return "draws='zeros': every random number of the forward is 0, in the model as in the file"


class ZeroDraws(TorchFunctionMode):
    """Gives what torch's functions give where the random numbers behind them are zero.

    =====================================================  ==========================
    ``randn``, ``rand``, ``randn_like``, ``rand_like``     0
    ``normal``, ``normal_``, and so `torch.distributions`  the mean
    ``uniform_``                                           the lower bound
    ``log_normal_``                                        e to the mean
    ``bernoulli``, ``bernoulli_``, ``exponential_``        0
    dropout in a training mode of its own                  the input
    =====================================================  ==========================

    Whole numbers (``randint``, ``multinomial``, ``randperm``) are drawn as ever, so that a model
    that draws them is found not to be deterministic.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call one function."""
        given = dict(kwargs or {})
        instead = _INSTEAD.get(func)
        if instead is None:
            return func(*args, **given)
        given.pop("generator", None)
        return instead(*args, **given)


def _normal(mean: Any = 0.0, std: Any = 1.0, size: Any = None, **given: Any) -> Tensor:
    if size is not None:
        return torch.full(size, float(mean), **given)
    spread = std if isinstance(std, Tensor) else torch.as_tensor(mean)
    drawn: Tensor = torch.zeros_like(spread) + mean
    return drawn


def _uniform_(tensor: Tensor, *bounds: float, **named: float) -> Tensor:
    return tensor.fill_(bounds[0] if bounds else named.get("from", 0.0))


def _first(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def _bernoulli(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(tensor)


def _zero_(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor.fill_(0.0)


_INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.randn: torch.zeros,
    torch.rand: torch.zeros,
    torch.randn_like: torch.zeros_like,
    torch.rand_like: torch.zeros_like,
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.normal_: lambda tensor, mean=0.0, std=1.0: tensor.fill_(mean),
    Tensor.log_normal_: lambda tensor, mean=1.0, std=2.0: tensor.fill_(math.exp(mean)),
    Tensor.uniform_: _uniform_,
    Tensor.bernoulli_: _zero_,
    Tensor.exponential_: _zero_,
    torch.dropout: _first,
    torch.feature_dropout: _first,
    torch.alpha_dropout: _first,
    torch.feature_alpha_dropout: _first,
    functional.dropout: _first,
    functional.dropout1d: _first,
    functional.dropout2d: _first,
    functional.dropout3d: _first,
    functional.alpha_dropout: _first,
    functional.feature_alpha_dropout: _first,
}
