"""Networks that read the weight of a layer: some call the layer too, some never do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Hooked = Callable[[nn.Module], nn.Module]


def _linear(hooked: Hooked, size: int = 3) -> nn.Linear:
    return cast(nn.Linear, hooked(nn.Linear(size, size)))


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def transform(layer: nn.Linear, x: Tensor) -> Tensor:
    return cast(Tensor, layer(x))


class Direct(nn.Module):
    """Reads the weight, and calls nothing."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.l = _linear(hooked)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.l.weight, self.l.bias)


class Aliased(Direct):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.l
        weight = layer.weight
        return x @ weight.t()


class Named(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.l, "weight"))  # noqa: B009


class Helped(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return project(self.l, x)


class Methodical(Direct):
    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.l, x)


class Static(Direct):
    """By a static method, on an owner that has another name than self."""

    @staticmethod
    def project(layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight)

    def forward(me, x: Tensor) -> Tensor:
        return me.project(me.l, x)


class Local(Direct):
    """By functions within the forward."""

    def forward(self, x: Tensor) -> Tensor:
        def project(layer: nn.Linear) -> Tensor:
            return apply(layer)

        apply = lambda layer: F.linear(x, layer.weight)  # noqa: E731
        return project(self.l)


class Searched(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(Tensor, self.get_submodule("l").weight))


class Chained(nn.Sequential):
    """Reads its own entry, in place of the forward that it overrides."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__(_linear(hooked))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(Any, self[0]).weight)


class Owned(Direct):
    @property
    def kernel(self) -> Tensor:
        return self.l.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class Listed(nn.Module):
    """Reads the weights of a list in a loop."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_linear(hooked), _linear(hooked)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(x, cast(Tensor, layer.weight))
        return x


class Indexed(Listed):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.layers)):
            x = torch.einsum("bi,oi->bo", x, cast(Any, self.layers[i]).weight)
        return x


class Stacked(Listed):
    def forward(self, x: Tensor) -> Tensor:
        weights = torch.stack([cast(Any, layer).weight for layer in self.layers])
        return x @ weights.sum(0)


class Mapped(nn.Module):
    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": _linear(hooked)})

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.layers.items():
            x = x @ cast(Any, layer).weight
        return x


class Deep(nn.Module):
    """Reads through a child that holds the layer."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.l = _linear(hooked)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(Any, self.inner).l.weight)


class Nested(nn.Sequential):
    def __init__(self, hooked: Hooked) -> None:
        super().__init__(nn.Linear(3, 3), Direct(hooked), nn.Tanh())


_READER = """
class FromText(nn.Module):
    def __init__(self, hooked):
        super().__init__()
        self.l = hooked(nn.Linear(3, 3))

    def forward(self, x):
        return F.linear(x, self.l.weight, self.l.bias)
"""
_made: dict[str, Any] = {"nn": nn, "F": F, "__name__": "from_text"}
exec(_READER, _made)


class Loss(nn.Module):
    """Torch's own loss with a projection in it, at fixed targets."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.loss = cast(Any, nn).LinearCrossEntropyLoss(3, 3, bias=True)
        hooked(self.loss.linear)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.loss(x, torch.arange(len(x)) % 3))


class Attention(nn.Module):
    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)
        hooked(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.attention(x, x, x, need_weights=False)[0])


class Merged(Direct):
    """Calls the layer in train mode; in eval mode merges its weight into another, as SPAN does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return cast(Tensor, self.l(x))
        return F.linear(x, self.merge())

    def merge(self) -> Tensor:
        return self.l.weight.detach() + torch.eye(3)


class MergedChain(nn.Module):
    """Does the same with layers in a chain, which is called in train mode alone."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Sequential(hooked(nn.Linear(3, 3))), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return cast(Tensor, self.chain(x))
        return F.linear(x, self.chain[0][0].weight.detach() * 2)  # type: ignore[index]


class Early(Direct):
    """Returns in eval mode before it calls the layer."""

    def forward(this, x: Tensor) -> Tensor:
        if not (this.training and x.dim()):
            return F.linear(x, this.l.weight)
        return cast(Tensor, this.l(x))


class Chosen(Direct):
    """Chooses by its mode within an expression."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.l.weight) if not self.training else cast(Tensor, self.l(x))


class Settled(Direct):
    """Chooses by what it was built with, as the attention of BEiT and of Swin does."""

    bias: nn.Parameter | None = None
    fused, kind = True, "sum"

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None or self.kind == "mean":
            return cast(Tensor, self.l(x))
        if not self.fused:
            x = self.l(x)
        return F.linear(x, self.l.weight)


# ------------------------------------------------------------------ called as well


class Evaluated(Direct):
    """Reads the weight in train mode, and calls the layer in eval mode, whatever else is so."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or (x.dim() > 9 and not self.training):
            return F.linear(x, self.l.weight)
        return cast(Tensor, self.l(x))


class Unsettled(Settled):
    """Chooses by what a change of its mode sets."""

    def train(self, mode: bool = True) -> Unsettled:
        self.fused = mode
        return super().train(mode)


class SetInside(Settled):
    """Chooses by what its forward sets."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__(hooked)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        self.fused = x.dim() > 9
        out = super().forward(x)
        self.fused = True
        return out


class Both(Direct):
    """Calls the layer, then reads it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(cast(Tensor, self.l(x)), self.l.weight)


class ChainCall(MergedChain):
    """Reads the weight of a layer in a chain, which it calls through a list and by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        for chain in [self.chain]:
            x = chain(input=x)
        return x + self.chain[0][0].weight.sum()  # type: ignore[index, union-attr]


class Typed(Direct):
    """Reads the dtype alone."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.l(x.to(self.l.weight.dtype)))


class Handed(Direct):
    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.l, x, use_reentrant=False)
        return F.linear(cast(Tensor, y), self.l.weight)


class HelpedCall(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(transform(self.l, x), self.l.weight)


class Looped(Listed):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(layer(x), cast(Tensor, layer.weight))
        return x


class Dynamic(nn.Module):
    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.l0, self.l1 = _linear(hooked), _linear(hooked)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            layer = getattr(self, f"l{i}")
            x = layer(x) @ layer.weight
        return x


class Tied(nn.Module):
    """Read by one parent, called by another."""

    def __init__(self, hooked: Hooked) -> None:
        super().__init__()
        self.caller = nn.Sequential(_linear(hooked), nn.ReLU())
        self.reader = Direct(hooked)
        self.reader.l = cast(nn.Linear, self.caller[0])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.reader(self.caller(x)))


class LocalCall(Direct):
    def forward(self, x: Tensor) -> Tensor:
        def apply(layer: nn.Linear, depth: int = 1) -> Tensor:
            return apply(layer, depth - 1) if depth else cast(Tensor, layer(x))

        return F.linear(apply(self.l), self.l.weight)


_TABLE: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "reads": lambda layer, x: F.linear(x, layer.weight),
    "calls": lambda layer, x: cast(Tensor, layer(x)),
}


class Tabled(Direct):
    """Hands the layer to what no source tells of, beside another one that is called."""

    def __init__(self, hooked: Hooked, does: str = "calls") -> None:
        super().__init__(hooked)
        self.other, self.does = _linear(hooked), does

    def forward(self, x: Tensor) -> Tensor:
        return _TABLE[self.does](self.l, cast(Tensor, self.other(x)))


class Inherited(Both):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


READERS: dict[str, Callable[[Hooked], nn.Module]] = {
    "direct": Direct,
    "aliased": Aliased,
    "named": Named,
    "helped": Helped,
    "methodical": Methodical,
    "static": Static,
    "local": Local,
    "searched": Searched,
    "chained": Chained,
    "owned": Owned,
    "listed": Listed,
    "indexed": Indexed,
    "stacked": Stacked,
    "mapped": Mapped,
    "deep": Deep,
    "nested": Nested,
    "from-text": _made["FromText"],
    "attention": Attention,
    "merged": Merged,
    "merged-chain": MergedChain,
    "early": Early,
    "chosen": Chosen,
    "settled": Settled,
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    READERS["loss"] = Loss
CALLERS: dict[str, Callable[[Hooked], nn.Module]] = {
    "both": Both,
    "evaluated": Evaluated,
    "unsettled": Unsettled,
    "set-inside": SetInside,
    "chain-call": ChainCall,
    "typed": Typed,
    "handed": Handed,
    "helped-call": HelpedCall,
    "looped": Looped,
    "dynamic": Dynamic,
    "tied": Tied,
    "inherited": Inherited,
    "local-call": LocalCall,
    "tabled": Tabled,
}
